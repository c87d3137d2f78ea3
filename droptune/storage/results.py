"""What outlives a training: scores per example, verdicts, and the bytes of small checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from droptune.storage import schema
from droptune.storage.database import Database, clock

PIECE = 4 * 2**20  # bytes; MySQL's servers take packets of 16 MB unless told otherwise


class Results:
    """The part of Storage that keeps scores, verdicts and blobs."""

    database: Database

    def put_score(self, training_id: int, split: str, name: str, score: bytes) -> bool:
        """Keep one score of a training; False when it has another already, which stays, or was
        deleted."""
        key = {"training_id": training_id, "split": split, "name": name}

        def work(connection: sa.Connection) -> bool:
            there = _score(connection, training_id, split, name)
            if there is not None:
                return there == score
            t = schema.trainings.c
            kept = sa.select(t.id).where(t.id == training_id).with_for_update()
            if connection.execute(kept).first() is None:
                return False
            rows = [key | {"score": score}]
            self.database.insert_new(connection, schema.scores, rows, tuple(key))
            return True

        return self.database.write(work)

    def get_score(self, training_id: int, split: str, name: str) -> bytes | None:
        """The bytes that `put_score` kept, or None."""
        return self.database.read(lambda c: _score(c, training_id, split, name))

    def scores(self, study_id: int, split: str, name: str) -> dict[int, bytes]:
        """One score of all trainings of a study that have it, by training id."""
        t, s = schema.trainings.c, schema.scores.c
        query = (
            sa.select(s.training_id, s.score)
            .join(schema.trainings, t.id == s.training_id)
            .where(t.study_id == study_id, s.split == split, s.name == name)
        )

        def work(connection: sa.Connection) -> dict[int, bytes]:
            return {row.training_id: bytes(row.score) for row in connection.execute(query)}

        return self.database.read(work)

    def put_verdict(self, study_id: int, verdict: Mapping[str, Any]) -> None:
        """Keep (or replace) a study's verdict."""

        def work(connection: sa.Connection) -> None:
            row = {
                "study_id": study_id,
                "verdict": json.dumps(dict(verdict)),
                "judged_at": clock(connection),
            }
            self.database.put(connection, schema.verdicts, [row], ("study_id",))

        self.database.write(work)

    def get_verdict(self, study_id: int) -> dict[str, Any] | None:
        """The study's verdict, or None before there is one."""
        c = schema.verdicts.c
        query = sa.select(c.verdict).where(c.study_id == study_id)
        text = self.database.read(lambda connection: connection.execute(query).scalar())
        return None if text is None else dict(json.loads(text))

    # -- blobs: bytes under a name --------------------------------------------------------------

    def put_blob(self, name: str, content: bytes) -> None:
        """Keep (or replace) bytes under a name of at most 255 characters, all or nothing."""
        pieces = [content[i : i + PIECE] for i in range(0, len(content), PIECE)] or [b""]

        def work(connection: sa.Connection) -> None:
            connection.execute(schema.blobs.delete().where(schema.blobs.c.name == name))
            for i, piece in enumerate(pieces):
                row = {"name": name, "piece": i, "content": piece}
                connection.execute(schema.blobs.insert(), row)

        self.database.write(work)

    def get_blob(self, name: str) -> bytes | None:
        """The bytes of that name, or None."""
        c = schema.blobs.c
        query = sa.select(c.content).where(c.name == name).order_by(c.piece)

        def work(connection: sa.Connection) -> bytes | None:
            pieces = [bytes(row.content) for row in connection.execute(query)]
            return b"".join(pieces) if pieces else None

        return self.database.read(work)

    def delete_blob(self, name: str) -> None:
        """Remove the bytes of that name, if there are any."""
        chosen = schema.blobs.delete().where(schema.blobs.c.name == name)
        self.database.write(lambda connection: connection.execute(chosen) and None)

    def blob_names(self, prefix: str = "") -> list[str]:
        """The names that begin with `prefix`, sorted."""
        c = schema.blobs.c
        query = sa.select(c.name).where(c.piece == 0, c.name.startswith(prefix, autoescape=True))

        def work(connection: sa.Connection) -> list[str]:
            return sorted(connection.execute(query).scalars())

        return self.database.read(work)


def _score(connection: sa.Connection, training_id: int, split: str, name: str) -> bytes | None:
    c = schema.scores.c
    query = sa.select(c.score).where(c.training_id == training_id, c.split == split, c.name == name)
    found = connection.execute(query).scalar()
    return None if found is None else bytes(found)
