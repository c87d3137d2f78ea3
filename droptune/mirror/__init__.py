"""The mirror of a study in MLflow: SQL is the truth, this is a projection of it.

`Mirror` writes (see `sync`), `Tracking` says where MLflow is. MLflow is imported inside
functions only, so that a study whose mirror is `none` never loads it.
"""

from droptune.mirror.links import set_aside
from droptune.mirror.study import MirroredStudy
from droptune.mirror.sync import Mirror, SyncResult
from droptune.mirror.tracking import MirrorError, Tracking

__all__ = ["Mirror", "MirrorError", "MirroredStudy", "SyncResult", "Tracking", "set_aside"]
