"""PostgreSQL as projections use it."""
