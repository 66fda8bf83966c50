"""`python -m ops` is the `seamark` command."""

from ops.cli import main

main()
