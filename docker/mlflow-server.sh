#!/bin/sh
# `mlflow server` with the options given. The backend's URL has a password, so it comes from a
# file and goes by the environment: the command line of a process is for everybody to see.
set -eu
MLFLOW_BACKEND_STORE_URI="$(cat "${MLFLOW_BACKEND_STORE_URI_FILE:-/run/secrets/mlflow-backend-url}")"
export MLFLOW_BACKEND_STORE_URI
exec mlflow server "$@"
