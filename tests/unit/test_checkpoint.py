"""Snapshots survive what happens to processes and disks."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from droptune.errors import WorkRemainsError
from droptune.trainers.checkpoint import CheckpointStore, Directory, SqlBlobs, from_bytes, to_bytes
from droptune.trainers.slot import Snapshot

META = {"updates": 12, "best_value": 0.5, "rest": {"groups": [{"betas": [0.9, 0.99]}]}}


def snapshot(interval: int = 3) -> Snapshot:
    tensors = {
        "model/weight": torch.randn(3, 2, dtype=torch.float64).T,
        "model/count": torch.tensor(7),
        "model/flag": torch.tensor([True, False]),
        "optimizer/exp_avg/weight": torch.randn(2, 3).to(torch.bfloat16),
        "model/spectrum": torch.randn(3, dtype=torch.complex64),
        "model/filter": torch.randn(2, 3, dtype=torch.complex128).T,
        "best/weight": torch.zeros(0),
    }
    return Snapshot(interval, tensors, META)


class Blobs:
    """The part of a storage that keeps blobs, in a dict."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def put_blob(self, name, content):
        self.content[name] = content

    def get_blob(self, name):
        return self.content.get(name)

    def delete_blob(self, name):
        self.content.pop(name, None)

    def blob_names(self, prefix=""):
        return sorted(name for name in self.content if name.startswith(prefix))


@pytest.fixture(params=["directory", "sql"])
def store(request, tmp_path):
    if request.param == "sql":
        return CheckpointStore(SqlBlobs(Blobs(), "study-1/"))
    return CheckpointStore.at(tmp_path / "checkpoints")


def assert_equal(a: Snapshot | None, b: Snapshot) -> None:
    assert a is not None
    assert (a.interval, a.meta) == (b.interval, b.meta)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in b.tensors.items():
        assert a.tensors[name].dtype == tensor.dtype
        assert torch.equal(a.tensors[name], tensor)


def test_a_snapshot_comes_back_as_it_was(store):
    kept = snapshot()
    assert store.load(5, 1) is None
    assert store.save(5, 1, kept)
    assert_equal(store.load(5, 1), kept)
    assert store.load(5, 2) is None
    later = snapshot(4).with_meta(curve=[[1, {"val/nll": 0.5}]])
    store.save(5, 1, later)
    assert_equal(store.load(5, 1), later)


def test_parts_of_a_snapshot():
    assert set(snapshot().part("model")) == {"weight", "count", "flag", "spectrum", "filter"}
    assert set(snapshot().part("optimizer")) == {"exp_avg/weight"}


def test_weights_outlive_the_snapshots(store):
    weights = {"layer.weight": torch.randn(2, 3), "layer.count": torch.tensor(1)}
    store.save(5, 1, snapshot())
    store.save(5, 2, snapshot())
    store.save(51, 1, snapshot())
    assert store.load_weights(5) is None
    assert store.save_weights(5, weights, {"values": [0.25]})
    store.delete(5, weights=False)
    assert store.load(5, 1) is None
    assert store.load(5, 2) is None
    assert store.load(51, 1) is not None
    loaded, meta = store.load_weights(5)
    assert meta == {"values": [0.25]}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    store.delete(5)
    assert store.load_weights(5) is None
    store.delete(5)


def test_a_full_disk_is_a_warning_and_the_last_snapshot_stays(tmp_path, monkeypatch, caplog):
    store = CheckpointStore.at(tmp_path)
    kept = snapshot()
    store.save(5, 1, kept)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        assert not store.save(5, 1, snapshot(4))
    monkeypatch.undo()
    assert "No space left" in caplog.text
    assert_equal(store.load(5, 1), kept)
    assert [path.name for path in (tmp_path / "5").iterdir()] == ["attempt-1.safetensors"]


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert not CheckpointStore.at(tmp_path / "file").save(5, 1, snapshot())
    assert "training goes on" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"abc", b"\xff" * 64])
def test_a_damaged_snapshot_is_a_warning(tmp_path, damage, caplog):
    store = CheckpointStore.at(tmp_path)
    store.save(5, 1, snapshot())
    (tmp_path / "5" / "attempt-1.safetensors").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert store.load(5, 1) is None
    assert "going on without it" in caplog.text


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_a_snapshot_that_cannot_be_read_just_now_is_not_given_up(tmp_path, monkeypatch, code):
    store = CheckpointStore.at(tmp_path)
    kept = snapshot()
    store.save(5, 1, kept)

    def unread(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_bytes", unread)
    with pytest.raises(WorkRemainsError, match=r"attempt-1.*goes on when it can be read"):
        store.load(5, 1)
    assert store.load_weights(5) is None
    monkeypatch.undo()
    assert_equal(store.load(5, 1), kept)


def test_the_content_is_safetensors_with_json(tmp_path):
    content = to_bytes(snapshot().tensors, META)
    tensors, meta = from_bytes(content)
    assert meta == META
    assert set(tensors) == set(snapshot().tensors)
    assert b"pickle" not in content
    assert content[8:9] == b"{"


def test_views_of_one_tensor_are_kept_apart():
    stack = torch.randn(4, 6)
    tensors, _ = from_bytes(to_bytes({"a": stack[0, :3], "b": stack[1, 3:], "c": stack[0]}, {}))
    assert torch.equal(tensors["b"], stack[1, 3:])
    assert torch.equal(tensors["c"], stack[0])


def test_where_a_study_keeps_its_checkpoints(tmp_path):
    def study(store, directory=None):
        chosen = SimpleNamespace(store=store, directory=directory)
        return SimpleNamespace(
            spec=SimpleNamespace(checkpoints=chosen),
            file_name="mine",
            row=SimpleNamespace(uuid="0123456789abcdef"),
            storage=Blobs(),
        )

    CheckpointStore.of(study("directory"), tmp_path).save(5, 1, snapshot())
    assert (tmp_path / ".droptune/checkpoints/mine-01234567/5/attempt-1.safetensors").exists()
    CheckpointStore.of(study("directory", "shared"), tmp_path).save(5, 1, snapshot())
    assert (tmp_path / "shared/mine-01234567/5/attempt-1.safetensors").exists()
    sql = study("sql")
    CheckpointStore.of(sql, tmp_path).save(5, 1, snapshot())
    assert list(sql.storage.content) == ["mine-01234567/5/attempt-1.safetensors"]


def test_a_writer_that_dies_leaves_what_was_there(tmp_path):
    directory = Directory(tmp_path)
    directory.put("5/a.safetensors", b"whole")
    (tmp_path / "5" / ".writing-x").write_bytes(b"half")
    assert directory.get("5/a.safetensors") == b"whole"
    assert directory.names("5/") == ["5/a.safetensors"]


def test_listing_goes_on_while_others_remove_folders(tmp_path):
    blobs, over = Directory(tmp_path), threading.Event()

    def come_and_go():
        while not over.is_set():
            for number in range(20):
                blobs.put(f"{number}/1.safetensors", b"x")
            for number in range(20):
                blobs.delete(f"{number}/1.safetensors")

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(400):
            blobs.names("")
    finally:
        over.set()
        other.join()
