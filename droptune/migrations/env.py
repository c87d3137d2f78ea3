"""Runs droptune's migrations on the connection that `droptune.storage.creation` hands over."""

from __future__ import annotations

from alembic import context

from droptune.storage.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite alters by copying
)
with context.begin_transaction():
    context.run_migrations()
