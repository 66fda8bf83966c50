"""The core of Seamark: events, logs, the dispatcher and the broker access they share. It knows no HTTP."""
