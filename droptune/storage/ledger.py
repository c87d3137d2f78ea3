"""What SQL keeps for the mirror: who mirrors a study now, and which run mirrors what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from droptune.storage import schema
from droptune.storage.database import Database, clock


class Ledger:
    """The part of Storage that the mirror uses."""

    database: Database

    def acquire_mirror_lease(self, study_id: int, owner: str, seconds: float) -> bool:
        """Take or renew the right to mirror a study; False while another owner has it."""
        m = schema.mirrors.c

        def work(connection: sa.Connection) -> bool:
            at = clock(connection)
            row = {"study_id": study_id, "owner": owner, "lease_until": at + seconds}
            self.database.insert_new(connection, schema.mirrors, [row], ("study_id",))
            free = sa.or_(m.owner == owner, m.lease_until < at)
            taking = schema.mirrors.update().where(m.study_id == study_id, free)
            connection.execute(taking.values(owner=owner, lease_until=at + seconds))
            now_owner = sa.select(m.owner).where(m.study_id == study_id)
            return bool(connection.execute(now_owner).scalar() == owner)

        return self.database.write(work)

    def release_mirror_lease(self, study_id: int, owner: str) -> None:
        """Let the next one mirror the study."""
        m = schema.mirrors.c
        mine = schema.mirrors.delete().where(m.study_id == study_id, m.owner == owner)
        self.database.write(lambda connection: connection.execute(mine) and None)

    def mirror_links(self, study_id: int) -> dict[int, dict[str, Any]]:
        """What `put_mirror_link` kept for a study, by training id."""
        c = schema.links.c
        query = sa.select(c.training_id, c.link).where(c.study_id == study_id, c.training_id != 0)

        def work(connection: sa.Connection) -> dict[int, dict[str, Any]]:
            return {row.training_id: json.loads(row.link) for row in connection.execute(query)}

        return self.database.read(work)

    def put_mirror_link(self, study_id: int, training_id: int, data: Mapping[str, Any]) -> None:
        """Keep (or replace) what the mirror knows of a training's run."""
        row = {"study_id": study_id, "training_id": training_id, "link": json.dumps(dict(data))}
        unique = ("study_id", "training_id")
        self.database.write(lambda c: self.database.put(c, schema.links, [row], unique))

    def mirror_state(self, study_id: int) -> dict[str, Any]:
        """What `put_mirror_state` kept of the study as a whole ({} before)."""
        c = schema.links.c
        query = sa.select(c.link).where(c.study_id == study_id, c.training_id == 0)
        text = self.database.read(lambda connection: connection.execute(query).scalar())
        return {} if text is None else dict(json.loads(text))

    def put_mirror_state(self, study_id: int, data: Mapping[str, Any]) -> None:
        """Keep (or replace) what the mirror knows of the study as a whole."""
        self.put_mirror_link(study_id, 0, data)

    def forget_mirror_links(self, study_id: int) -> None:
        """Forget all runs of a study, to mirror it again from nothing."""
        chosen = schema.links.delete().where(schema.links.c.study_id == study_id)
        self.database.write(lambda connection: connection.execute(chosen) and None)
