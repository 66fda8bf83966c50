"""What each command is held against, by what it is about. `tests/acceptance/test_every_command.py` runs all of them."""
