"""Every shipped study: its program loads, computes a loss, and its file fits its sites."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from droptune.errors import ProgramError
from droptune.program.loading import load_program
from droptune.program.source import fingerprint
from droptune.sites.installed import find_program_sites
from droptune.sites.site import Site
from droptune.space.space import Space
from droptune.spec.spec import StudySpec

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Fashion-MNIST's files with a few images."""
    for part, count in (("train", 8000), ("t10k", 50)):
        for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = np.random.default_rng(0).integers(0, 10, shape, dtype=np.uint8)
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            path = tmp_path / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), 1))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    return tmp_path


def fresh(name):
    """A study's program without the data that another test has read."""
    return replace(load_program(f"studies/{name}.py", ROOT))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_programs_and_files_fit(path, images):
    spec = StudySpec.load(path)
    program = replace(load_program(spec.program, ROOT))
    program.check()
    splits = program.splits(0)
    assert min(splits.sizes.values()) > 0
    assert set(splits.sizes) == {"train", "validation", "test"}
    sites: list[Site] = list(find_program_sites(program).sites)
    spec = spec.resolved(program)
    space = Space.of(sites, spec, program)
    assert {s for p in space.rates for s in p.sites} == {site.path for site in sites}
    assert spec.intervals(program, splits.train.n) == spec.epochs
    assert path.stem.startswith(Path(spec.program).stem)
    assert spec.program in fingerprint(spec.program, ROOT)


def test_studies_of_one_program_differ_in_what_they_ask(images):
    asked = [StudySpec.load(path) for path in FILES if path.stem.startswith("fashion_mnist_mlp")]
    program = fresh("fashion_mnist_mlp_2000")
    questions = {(s.resolved(program).objectives[0].metric, s.epochs) for s in asked}
    assert questions == {("nll", 60), ("accuracy", 60), ("nll", 5)}


def test_images_of_bytes_are_scaled(images):
    program = fresh("fashion_mnist_mlp_2000")
    x, y = program.splits(0).test.tree
    assert (x.shape, x.dtype, y.dtype) == ((50, 1, 28, 28), torch.float32, torch.int64)
    assert float(x.max()) <= 1
    assert set(fingerprint("studies/fashion_mnist_mlp_2000.py", ROOT)) == {
        "studies/fashion_mnist.py",
        "studies/fashion_mnist_mlp_2000.py",
    }


def test_missing_images_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    program = fresh("fashion_mnist_cnn")
    with pytest.raises(ProgramError, match=r"no Fashion-MNIST at .*: apt install") as caught:
        program.splits(0)
    assert "\n" not in str(caught.value)
