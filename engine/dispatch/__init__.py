"""The dispatcher: events become records of their users' logs, each exactly once and in order."""
