"""droptune's own tables (prefix `droptune_`), beside Optuna's in one database.

Times are seconds since 1970 by the database's clock. JSON is text: what is in it is read and
written whole.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

HEAD = "0001"  # the newest revision in droptune/migrations
KNOWN = ("0001",)  # all of them, oldest first
VERSION_TABLE = "droptune_alembic_version"

metadata = sa.MetaData()

LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql")  # TEXT ends at 64 KB
LongBytes = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql")


def _exact(length: int) -> sa.types.TypeEngine[str]:
    """Text compared letter by letter, also on MySQL."""
    binary = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return sa.String(length).with_variant(binary, "mysql")


def _table(name: str, *columns: sa.schema.SchemaItem, counted: bool = False) -> sa.Table:
    """`counted`: no id is given twice, as SQLite would after a delete; late workers name them."""
    return sa.Table(
        name,
        metadata,
        *columns,
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        sqlite_autoincrement=counted,
    )


studies = _table(
    "droptune_studies",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("optuna_id", sa.Integer, nullable=False),
    sa.Column("name", _exact(512), nullable=False, unique=True),
    sa.Column("uuid", sa.String(36), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("intervals", sa.Integer, nullable=False),
    sa.Column("directions", LongText, nullable=False),
    sa.Column("spec", LongText, nullable=False),
    sa.Column("sites", LongText, nullable=False),
    sa.Column("meta", LongText, nullable=False),
    sa.Column("budget_trials", sa.Integer),
    sa.Column("budget_intervals", sa.BigInteger),
    sa.Column("budget_device_seconds", sa.Double),
    sa.Column("budget_deadline", sa.Double),
    # Counters below change only under a lock on the row.
    sa.Column("next_number", sa.Integer, nullable=False),
    sa.Column("intervals_taken", sa.BigInteger, nullable=False),  # trained or reserved
    sa.Column("finished", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    counted=True,
)

trainings = _table(
    "droptune_trainings",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.ForeignKey("droptune_studies.id"), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("number", sa.Integer),
    sa.Column("trial_id", sa.Integer),  # Optuna's
    sa.Column("label", _exact(255), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("assignment", LongText),
    sa.Column("weights_seed", sa.BigInteger, nullable=False),
    sa.Column("data_seed", sa.BigInteger, nullable=False),
    sa.Column("split_seed", sa.BigInteger, nullable=False),
    sa.Column("seed_index", sa.Integer),
    sa.Column("intervals", sa.Integer, nullable=False),
    sa.Column("intervals_done", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("lease_epoch", sa.Integer, nullable=False),
    sa.Column("lease_until", sa.Double),
    sa.Column("batch", sa.String(36)),  # the call that queued it
    sa.Column("ticket", sa.String(36)),  # the claim that holds it
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", LongText),
    sa.Column("objective", sa.Double),  # the first value, where it is finite
    sa.Column("objectives", LongText),
    sa.Column("best_interval", sa.Integer),
    sa.Column("worker_id", sa.Integer),
    sa.Column("finish_order", sa.Integer),
    sa.Column("queued_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("ended_at", sa.Double),
    sa.UniqueConstraint("study_id", "number", name="uq_droptune_trainings_number"),
    sa.Index("ix_droptune_trainings_state", "state", "study_id"),
    sa.Index("ix_droptune_trainings_finish", "study_id", "finish_order"),
    counted=True,
)

# One row per interval, a JSON object of key: value: what was measured together is written, kept
# and read together, at half the time and size of a row per key (benchmarks/storage.py).
measurements = _table(
    "droptune_measurements",
    sa.Column("training_id", sa.ForeignKey("droptune_trainings.id"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("interval", sa.Integer, primary_key=True, autoincrement=False, quote=True),
    sa.Column("measured_at", sa.Double, nullable=False),
    sa.Column("measured", LongText, nullable=False),
)

workers = _table(
    "droptune_workers",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token", sa.String(36), nullable=False, unique=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("machine", sa.String(64), nullable=False),  # one boot of one kernel
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("device", sa.String(255), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("info", LongText, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("beat_at", sa.Double, nullable=False),
    sa.Column("lease_until", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
    counted=True,
)

usage = _table(
    "droptune_usage",
    sa.Column("worker_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("device_seconds", sa.Double, nullable=False),
)

widths = _table(
    "droptune_widths",
    sa.Column("device", _exact(255), primary_key=True),
    sa.Column("fingerprint", _exact(128), primary_key=True),
    sa.Column("width", LongText, nullable=False),
    sa.Column("measured_at", sa.Double, nullable=False),
)

mirrors = _table(
    "droptune_mirrors",
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("owner", sa.String(255), nullable=False),
    sa.Column("lease_until", sa.Double, nullable=False),
)

links = _table(
    "droptune_links",
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    # 0: the study as a whole
    sa.Column("training_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("link", LongText, nullable=False),
)

scores = _table(
    "droptune_scores",
    sa.Column("training_id", sa.ForeignKey("droptune_trainings.id"), primary_key=True),
    sa.Column("split", sa.String(16), primary_key=True),
    sa.Column("name", _exact(128), primary_key=True),
    sa.Column("score", LongBytes, nullable=False),
)

verdicts = _table(
    "droptune_verdicts",
    sa.Column("study_id", sa.ForeignKey("droptune_studies.id"), primary_key=True),
    sa.Column("verdict", LongText, nullable=False),
    sa.Column("judged_at", sa.Double, nullable=False),
)

# Bytes under a name, in pieces that fit into MySQL's default packet.
blobs = _table(
    "droptune_blobs",
    sa.Column("name", _exact(255), primary_key=True),
    sa.Column("piece", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("content", LongBytes, nullable=False),
)
