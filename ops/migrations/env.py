"""Run by Alembic: revisions are applied on the connection that `ops.migrate` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], target_metadata=None)
context.run_migrations()
