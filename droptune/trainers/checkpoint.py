"""Snapshots of running trainings and weights worth keeping: safetensors with JSON, never pickle.

They lie in a directory (one that all workers share) or, for small models, in SQL. Writing is
atomic: what is read is whole, whatever happened while it was written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import struct
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from droptune.errors import StorageError, WorkRemainsError
from droptune.trainers.slot import Snapshot

log = logging.getLogger("droptune.checkpoint")

DIRECTORY = ".droptune"  # below the project's root
_WRITING = ".writing-"
Weights = tuple[dict[str, Tensor], dict[str, Any]]


class Blobs(Protocol):
    """Bytes under names; `put` replaces, all or nothing."""

    def put(self, name: str, content: bytes) -> None: ...
    def get(self, name: str) -> bytes | None: ...
    def delete(self, name: str) -> None: ...
    def names(self, prefix: str) -> list[str]: ...


class Directory:
    """Blobs as files below one directory, which is made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, name: str, content: bytes) -> None:
        path = self.root / name
        handle, temporary = _temporary(path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_directory(path.parent)

    def get(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def delete(self, name: str) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process removed the folder meanwhile
            for left in path.parent.glob(f"{_WRITING}*"):  # by a writer that was killed
                left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others lie there
            path.parent.rmdir()
            self.root.rmdir()

    def names(self, prefix: str) -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        # unlike rglob, os.walk goes on where another process removes a folder meanwhile
        files = (Path(place, file) for place, _, found in os.walk(folder) for file in found)
        names = (f.relative_to(self.root).as_posix() for f in files if f.suffix == ".safetensors")
        return sorted(name for name in names if name.startswith(prefix))


def _temporary(folder: Path) -> tuple[int, str]:
    """An open file in the folder, which other processes may remove while it is empty."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(dir=folder, prefix=_WRITING)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _sync_directory(path: Path) -> None:
    """Make a rename survive a crash; where the system cannot, the file's content is safe."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _HasBlobs(Protocol):
    def put_blob(self, name: str, content: bytes) -> None: ...
    def get_blob(self, name: str) -> bytes | None: ...
    def delete_blob(self, name: str) -> None: ...
    def blob_names(self, prefix: str = "") -> list[str]: ...


class SqlBlobs:
    """Blobs in the study's database, under the study's own prefix."""

    def __init__(self, storage: _HasBlobs, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix

    def put(self, name: str, content: bytes) -> None:
        self._storage.put_blob(self._prefix + name, content)

    def get(self, name: str) -> bytes | None:
        return self._storage.get_blob(self._prefix + name)

    def delete(self, name: str) -> None:
        self._storage.delete_blob(self._prefix + name)

    def names(self, prefix: str) -> list[str]:
        found = self._storage.blob_names(self._prefix + prefix)
        return [name.removeprefix(self._prefix) for name in found]


class CheckpointStore:
    """Snapshots (one for each training and attempt) and kept weights of one study."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    @classmethod
    def at(cls, root: Path) -> CheckpointStore:
        """In a directory."""
        return cls(Directory(root))

    @classmethod
    def of(cls, study: Any, root: Path) -> CheckpointStore:
        """Where a study's spec says; by default in `.droptune` below the project's root.

        The study's uuid is part of the place, so that a new study never finds an old one's.
        """
        folder, base = f"{study.file_name}-{study.row.uuid[:8]}", checkpoint_directory(study, root)
        if base is None:
            return cls(SqlBlobs(study.storage, f"{folder}/"))
        return cls.at(base / folder)

    @property
    def in_database(self) -> bool:
        """Whether nothing can be kept while the database is away."""
        return isinstance(self._blobs, SqlBlobs)

    # -- snapshots ----------------------------------------------------------------------------

    def save(self, training_id: int, attempt: int, snapshot: Snapshot) -> bool:
        """Keep a snapshot in place of the last one; False (and a warning) where it cannot be."""
        meta = {"interval": snapshot.interval, "meta": dict(snapshot.meta)}
        return self._put(_snapshot(training_id, attempt), snapshot.tensors, meta)

    def load(self, training_id: int, attempt: int) -> Snapshot | None:
        """The last snapshot of an attempt, or None (also, with a warning, where it is damaged).

        Raises WorkRemainsError where it cannot be read just now: it may be whole.
        """
        name = _snapshot(training_id, attempt)
        try:
            found = self._get(name)
        except OSError as error:
            raise WorkRemainsError(
                f"cannot read the checkpoint {name} ({error}); its training goes on when it can be "
                "read again, or from the beginning when that file is deleted"
            ) from error
        if found is None:
            return None
        tensors, meta = found
        return Snapshot(int(meta["interval"]), tensors, meta["meta"])

    # -- weights ------------------------------------------------------------------------------

    def save_weights(
        self, training_id: int, weights: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> bool:
        """Keep a `state_dict`; False (and a warning) where it cannot be."""
        return self._put(_weights(training_id), weights, dict(meta))

    def load_weights(self, training_id: int) -> Weights | None:
        """What `save_weights` kept, or None (also, with a warning, where it cannot be read)."""
        try:
            return self._get(_weights(training_id))
        except (OSError, StorageError) as error:
            _warn_unread(_weights(training_id), error)
            return None

    def delete(self, training_id: int, *, weights: bool = True) -> None:
        """Remove the snapshots of a training, and its weights where asked."""
        names = self._blobs.names(f"{training_id}/")
        for name in names:
            if weights or name != _weights(training_id):
                self._blobs.delete(name)

    def sweep(self, finished: Container[int], *, keep_weights: Container[int]) -> None:
        """Remove what is kept of finished trainings, except for these ones' weights."""
        for name in self._blobs.names(""):
            training_id = int(name.partition("/")[0])
            needed = training_id in keep_weights and name == _weights(training_id)
            if training_id in finished and not needed:
                self._blobs.delete(name)

    # -- bytes --------------------------------------------------------------------------------

    def _put(self, name: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> bool:
        try:
            self._blobs.put(name, to_bytes(tensors, meta))
        except (OSError, StorageError) as error:
            log.warning("not kept: %s (%s); training goes on without it", name, error)
            return False
        return True

    def _get(self, name: str) -> Weights | None:
        """What is kept under a name, or None (also, with a warning, where it is damaged)."""
        content = self._blobs.get(name)
        try:
            return None if content is None else from_bytes(content)
        except MemoryError:
            raise
        except Exception as error:  # safetensors raises its own type for damaged content
            _warn_unread(name, error)
            return None


def _warn_unread(name: str, error: Exception) -> None:
    log.warning("cannot read %s (%s): going on without it", name, error)


def checkpoint_directory(study: Any, root: Path) -> Path | None:
    """Below which a study's checkpoints lie, for a project at `root`; None where SQL has them."""
    chosen = study.spec.checkpoints
    if chosen.store == "sql":
        return None
    return root / (chosen.directory or f"{DIRECTORY}/checkpoints")


def _snapshot(training_id: int, attempt: int) -> str:
    return f"{training_id}/attempt-{attempt}.safetensors"


def _weights(training_id: int) -> str:
    return f"{training_id}/weights.safetensors"


def to_bytes(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """Tensors and JSON-able `meta` in the safetensors format."""
    whole: dict[str, Tensor] = {}
    storages: set[int] = set()
    pairs = [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]
    real = {name: torch.view_as_real(tensors[name]) for name in pairs}  # the format has no such
    for name, tensor in {**tensors, **real}.items():
        shared = tensor.untyped_storage().data_ptr() in storages  # safetensors refuses to share
        whole[name] = (tensor.detach().clone() if shared else tensor.detach()).contiguous()
        storages.add(tensor.untyped_storage().data_ptr())
    return save(whole, metadata={"droptune": json.dumps(meta), "pairs": json.dumps(pairs)})


def from_bytes(content: bytes) -> Weights:
    """The inverse of `to_bytes`. The header is JSON behind its length (safetensors' format)."""
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    tensors = load(content)
    for name in json.loads(metadata.get("pairs", "[]")):
        tensors[name] = torch.view_as_complex(tensors[name])
    return tensors, json.loads(metadata.get("droptune", "{}"))
