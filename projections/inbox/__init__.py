"""The inbox in PostgreSQL: a fold of the logs, and the questions asked of it."""
