"""Streams and consumers: the files, the server, what differs, and what an operator repairs."""
