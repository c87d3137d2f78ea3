"""The study file and `droptune.toml`, read into frozen values."""
