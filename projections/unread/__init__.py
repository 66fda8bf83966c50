"""Unread counts in Redis: a fold of each user's log."""
