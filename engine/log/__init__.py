"""Appending to users' logs: marks, the writer that holds them, and the incarnation a log is in."""
