"""One connected device: its state machine, its way through the log, its way out."""
