"""What operators run: the `seamark` command, the embedded stack, the schema."""
