"""Every failure that droptune raises on purpose.

    DroptuneError               exit 1   something went wrong while working
    ├── UsageError              exit 2   what was given cannot be used
    │   ├── SpecError                    the study file
    │   ├── ProgramError                 the user's model, data or loss
    │   ├── SiteError                    dropout sites and rates
    │   ├── StorageError                 the database and what is asked of it
    │   │   ├── DatabaseAwayError        it cannot be reached now, and may be later
    │   │   ├── UnknownStudyError
    │   │   └── StudyChangedError        the file says another study than SQL
    │   └── LaunchError                  starting workers on an engine
    ├── ConfigurationError      exit 78  this worker can never work: do not restart it
    └── WorkRemainsError        exit 75  this worker must end, others (or a restart) go on

A message is one line: what was given, what was possible, what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class DroptuneError(Exception):
    """Something went wrong; the message is for the user."""

    exit_code = 1


class UsageError(DroptuneError):
    """What was given cannot be used."""

    exit_code = 2


class SpecError(UsageError):
    """A study file (or `droptune.toml`) is not valid."""


class ProgramError(UsageError):
    """The user's program cannot be loaded or used."""


class SiteError(UsageError):
    """A dropout site or a rate is unknown or impossible."""


class StorageError(UsageError):
    """The database cannot be reached or used."""


class DatabaseAwayError(StorageError):
    """The database cannot be reached now; it may be later."""


class UnknownStudyError(StorageError):
    """No study of that name is in the database."""


class StudyChangedError(StorageError):
    """A study of that name exists and says something else."""


class LaunchError(UsageError):
    """Workers cannot be started as asked."""


class ConfigurationError(DroptuneError):
    """This worker can never do this work (other code, no such device): do not restart it."""

    exit_code = 78


class WorkRemainsError(DroptuneError):
    """This worker has to end while work remains: restart it, or leave it to others."""

    exit_code = 75


SHORT = 4  # letters; two words that short are alike by chance


def nearest(given: str, choices: Iterable[str]) -> str:
    """A hint for a misspelt word: " (did you mean 'x'?)", or all choices where none is close.

    What files have in common, `.py` or `.yaml`, makes none of them close.
    """
    words = sorted(choices)
    known = {_without_suffix(word): word for word in words}
    bare = _without_suffix(given)
    close = difflib.get_close_matches(bare, known, n=3, cutoff=0.7 if len(bare) <= SHORT else 0.6)
    if close:
        return f" (did you mean {' or '.join(repr(known[word]) for word in close)}?)"
    return f" (possible: {', '.join(words)})" if words else ""


def _without_suffix(word: str) -> str:
    return re.sub(r"\.(py|ya?ml)$", "", word)
