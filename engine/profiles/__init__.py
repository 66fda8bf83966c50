"""Profiles of users: their preferences, what decisions read of them, and the cache of it in Redis."""
