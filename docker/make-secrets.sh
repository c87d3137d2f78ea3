#!/bin/sh
# Writes the secrets that compose.yaml and the manifests in kubernetes/ read: a random database
# password, and the two URLs that hold it. Never overwrites: the password is in the database too.
#   docker/make-secrets.sh [FOLDER] [DATABASE HOST]      (default: secrets beside this script, db)
set -eu
folder="${1:-$(dirname "$0")/secrets}"
host="${2:-db}"
if [ -e "$folder/postgres-password" ]; then
    echo "$folder/postgres-password exists: left as it is" >&2
    exit 0
fi
# The folder keeps others out. The files are readable: containers read them as another user.
mkdir -p "$folder"
chmod 700 "$folder"
echo '*' > "$folder/.gitignore"
password="$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
umask 022
printf '%s' "$password" > "$folder/postgres-password"
printf 'postgresql://droptune:%s@%s:5432/droptune' "$password" "$host" > "$folder/storage-url"
printf 'postgresql+psycopg://droptune:%s@%s:5432/mlflow' "$password" "$host" > "$folder/mlflow-backend-url"
