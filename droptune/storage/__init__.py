"""SQL: droptune's tables and Optuna's, in one database, written in the same transactions."""

from droptune.storage.claims import Progress
from droptune.storage.measurements import Ending
from droptune.storage.queue import Params
from droptune.storage.storage import Storage
from droptune.storage.studies import Budget, StudyRow, StudySummary
from droptune.storage.workers import Holding, Orders, WorkerRow

__all__ = [
    "Budget",
    "Ending",
    "Holding",
    "Orders",
    "Params",
    "Progress",
    "Storage",
    "StudyRow",
    "StudySummary",
    "WorkerRow",
]
