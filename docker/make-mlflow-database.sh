#!/bin/sh
# Run by the postgres image when it makes its first database. MLflow and Optuna both own a table
# `alembic_version`, so they cannot share a schema: MLflow gets a database of its own.
set -eu
psql --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" \
    --command='CREATE DATABASE mlflow'
