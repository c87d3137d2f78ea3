"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql")
LongBytes = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql")


def _exact(length: int) -> sa.types.TypeEngine[str]:
    binary = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return sa.String(length).with_variant(binary, "mysql")


def _table(name: str, *parts: sa.schema.SchemaItem, counted: bool = False) -> None:
    op.create_table(
        name,
        *parts,
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        sqlite_autoincrement=counted,
    )


def upgrade() -> None:
    _studies()
    _trainings()
    _workers()
    _mirror()
    _results()


def _studies() -> None:
    _table(
        "droptune_studies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("optuna_id", sa.Integer(), nullable=False),
        sa.Column("name", _exact(512), nullable=False),
        sa.Column("uuid", sa.String(length=36), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("directions", LongText, nullable=False),
        sa.Column("spec", LongText, nullable=False),
        sa.Column("sites", LongText, nullable=False),
        sa.Column("meta", LongText, nullable=False),
        sa.Column("budget_trials", sa.Integer()),
        sa.Column("budget_intervals", sa.BigInteger()),
        sa.Column("budget_device_seconds", sa.Double()),
        sa.Column("budget_deadline", sa.Double()),
        sa.Column("next_number", sa.Integer(), nullable=False),
        sa.Column("intervals_taken", sa.BigInteger(), nullable=False),
        sa.Column("finished", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        counted=True,
    )


def _trainings() -> None:
    _table(
        "droptune_trainings",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("number", sa.Integer()),
        sa.Column("trial_id", sa.Integer()),
        sa.Column("label", _exact(255), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("assignment", LongText),
        sa.Column("weights_seed", sa.BigInteger(), nullable=False),
        sa.Column("data_seed", sa.BigInteger(), nullable=False),
        sa.Column("split_seed", sa.BigInteger(), nullable=False),
        sa.Column("seed_index", sa.Integer()),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("intervals_done", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_epoch", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.Double()),
        sa.Column("batch", sa.String(length=36)),
        sa.Column("ticket", sa.String(length=36)),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", LongText),
        sa.Column("objective", sa.Double()),
        sa.Column("objectives", LongText),
        sa.Column("best_interval", sa.Integer()),
        sa.Column("worker_id", sa.Integer()),
        sa.Column("finish_order", sa.Integer()),
        sa.Column("queued_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double()),
        sa.Column("ended_at", sa.Double()),
        sa.ForeignKeyConstraint(["study_id"], ["droptune_studies.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("study_id", "number", name="uq_droptune_trainings_number"),
        counted=True,
    )
    op.create_index(
        "ix_droptune_trainings_finish",
        "droptune_trainings",
        ["study_id", "finish_order"],
        unique=False,
    )
    op.create_index(
        "ix_droptune_trainings_state", "droptune_trainings", ["state", "study_id"], unique=False
    )
    _table(
        "droptune_measurements",
        sa.Column("training_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("interval", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("measured_at", sa.Double(), nullable=False),
        sa.Column("measured", LongText, nullable=False),
        sa.ForeignKeyConstraint(["training_id"], ["droptune_trainings.id"]),
        sa.PrimaryKeyConstraint("training_id", "attempt", "interval"),
    )


def _workers() -> None:
    _table(
        "droptune_workers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(length=36), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("machine", sa.String(length=64), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(length=255), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("info", LongText, nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("beat_at", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("token"),
        counted=True,
    )
    _table(
        "droptune_usage",
        sa.Column("worker_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("study_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", "study_id"),
    )
    _table(
        "droptune_widths",
        sa.Column("device", _exact(255), nullable=False),
        sa.Column("fingerprint", _exact(128), nullable=False),
        sa.Column("width", LongText, nullable=False),
        sa.Column("measured_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("device", "fingerprint"),
    )


def _mirror() -> None:
    _table(
        "droptune_mirrors",
        sa.Column("study_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("study_id"),
    )
    _table(
        "droptune_links",
        sa.Column("study_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("training_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("link", LongText, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "training_id"),
    )


def _results() -> None:
    _table(
        "droptune_scores",
        sa.Column("training_id", sa.Integer(), nullable=False),
        sa.Column("split", sa.String(length=16), nullable=False),
        sa.Column("name", _exact(128), nullable=False),
        sa.Column("score", LongBytes, nullable=False),
        sa.ForeignKeyConstraint(["training_id"], ["droptune_trainings.id"]),
        sa.PrimaryKeyConstraint("training_id", "split", "name"),
    )
    _table(
        "droptune_verdicts",
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("verdict", LongText, nullable=False),
        sa.Column("judged_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["droptune_studies.id"]),
        sa.PrimaryKeyConstraint("study_id"),
    )
    _table(
        "droptune_blobs",
        sa.Column("name", _exact(255), nullable=False),
        sa.Column("piece", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("content", LongBytes, nullable=False),
        sa.PrimaryKeyConstraint("name", "piece"),
    )
