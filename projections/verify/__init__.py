"""Holding a projection against the fold of its streams, and against another projection."""
