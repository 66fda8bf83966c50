"""The embedded stack: real servers and the engine's roles as child processes of one command, for development and tests."""
