"""Folds of the logs: unread counters, inbox and delivery state, each rebuildable."""
