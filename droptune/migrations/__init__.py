"""droptune's alembic history; `droptune.storage.creation` runs it (there is no alembic.ini)."""
