"""The one runner of all that consume an ordered partition."""
