"""`droptune sites`: what it prints of programs and of bare models, in this process."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from droptune.cli import main
from droptune.errors import SiteError
from droptune.sites.examination import ExampleInput

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn

class Masked(nn.Module):
    def forward(self, x):
        return x * (torch.rand(x.shape) < 0.5) * 2

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_layer_with_quite_a_long_name_that_says_what_it_is_for = nn.Sequential(
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), Masked())

    def forward(self, x):
        x = self.a_layer_with_quite_a_long_name_that_says_what_it_is_for(x)
        return F.dropout(x, 0.2, self.training)

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(1000, 8), nn.Dropout(0.3)

    def forward(self, input_ids, attention_mask, bias=0):
        return self.drop(self.embedding(input_ids)) * attention_mask.unsqueeze(-1) + bias

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()

def make():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())

built = Net()
"""
PROGRAM = (
    MODEL
    + """
import droptune
x = torch.randn(40, 3)
labels = torch.arange(40) % 3
program = droptune.classification(
    model=lambda: nn.Linear(3, 2), train=(x, labels), batch_size=8, epochs=1, lr=0.1)
"""
)


@pytest.fixture
def sites(monkeypatch, capsys, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["droptune", "sites", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def test_what_is_piped_is_whole_and_says_where(sites):
    done = sites("model.py:Net", "--input", "2,4")
    assert done.code == 0, done.err
    path = "a_layer_with_quite_a_long_name_that_says_what_it_is_for"
    lines = done.out.splitlines()
    assert lines[1].split()[:3] == [f"{path}.0.1", "element", "0.1"]
    assert lines[2].split()[-1] == "model.py:18"
    assert lines[3] == (
        f"not tunable: {path}.1: rand (draws its own random numbers in forward (model.py:8); "
        "if it is dropout, write it as nn.Dropout or F.dropout to have it tuned)"
    )
    assert lines[4:] == ["suggested: a rate for each of the 2 sites"]


def test_lines_in_installed_packages_are_told_from_the_package_down(sites):
    config = "GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=9)"
    Path("gpt.py").write_text(f"""from transformers import GPT2Config, GPT2LMHeadModel
def make():
    return GPT2LMHeadModel({config})
""")
    done = sites("gpt.py:make", "--input", "input_ids=2,5:0..49")
    assert re.search(r"attention .* transformers/\S+\.py:\d+ *$", done.out, re.MULTILINE), done.out


@pytest.mark.parametrize("name", ["Net", "built"])
def test_classes_and_built_models_have_sites(sites, name):
    done = sites(f"model.py:{name}", "--input", "2x4", "--json")
    assert [site["kind"] for site in json.loads(done.out)["sites"]] == ["element", "element"]


def test_a_built_model_is_taken_before_classes(sites):
    assert "element" in sites("model.py", "--input", "2,4").out


def test_inputs_have_types_and_names(sites):
    inputs = ("input_ids=2x5:0..999", "attention_mask=2x5:1..1")
    done = sites("model.py:Tagger", *(word for given in inputs for word in ("--input", given)))
    assert "drop  element" in done.out, done.err
    done = sites("model.py:Tagger", "--input", "2,5:0..999", "--input", "bias=1", "--input", "2,5")
    assert "2×5×8" in done.out, done.err


def test_a_model_without_dropout_says_how_to_insert_some(sites):
    done = sites("model.py:make", "--input", "2,3")
    assert done.code == 0
    assert "no dropout acts" in done.out
    assert "insert: [{after: ReLU, kind: element}]" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.py:Net"], "model without a program: .*--input 1,1,28,28"),
        (["model.py:make"], "model without a program: .*--input 1,1,28,28"),
        (["model.py:Wide", "--input", "1"], r"building the model failed: .*argument: 'width'"),
        (["model.py:Net", "--input", "2,5"], r"model.py:17: RuntimeError: mat1 and mat2"),
        (
            ["model.py:Tagger", "--input", "2,5"],
            r"missing 1 required positional .*'attention_mask'",
        ),
        (["model.py:Net", "--input", "two"], "'two' is no example input: write --input 1,1,28"),
        (["program.py"], "class number 2, but .* tells 2 classes apart"),
    ],
)
def test_what_cannot_be_examined_is_refused_in_one_line(sites, arguments, said):
    done = sites(*arguments)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert re.search(said, done.err), done.err


def test_example_inputs_are_random_within_what_is_written():
    tokens = ExampleInput.parse("ids=3x7:5..9").tensor()
    assert tokens.shape == (3, 7)
    assert 5 <= int(tokens.min()) <= int(tokens.max()) <= 9
    assert ExampleInput.parse("4:bool").tensor().tolist() == [True] * 4
    assert ExampleInput.parse("1,1,28,28").tensor().is_floating_point()
    for wrong in ("", "a", "3:9..5", "3:1", "3;4", "=3", "3x"):
        with pytest.raises(SiteError):
            ExampleInput.parse(wrong)
