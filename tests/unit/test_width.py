"""The width is measured: the fastest within the memory, solo included."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from droptune.program.short_form import classification
from droptune.sites.installed import find_program_sites
from droptune.spec.objective import Objective
from droptune.spec.spec import StudySpec
from droptune.trainers import width
from droptune.trainers.fused import Fused, make_trainer, trainer_of, widest
from droptune.trainers.memory import free_memory
from droptune.trainers.recipe import Recipe
from droptune.trainers.solo import Solo
from droptune.trainers.width import WidthChoice, choose_width


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    program = classification(
        model=net, train=(x, (x[:, 0] > 0).long()), batch_size=8, epochs=2, lr=1e-3
    )
    return Recipe(program, find_program_sites(program).sites, Objective("nll"))


class Paced:
    """A real trainer on a clock of its own: `seconds(width)` for each interval."""

    def __init__(self, recipe, wide, seconds, clock):
        self.recipe, self._trainer = recipe, trainer_of(recipe, wide)
        self._seconds, self._clock = seconds(wide), clock

    def fill(self, index, training):
        self._trainer.fill(index, training)

    def train_interval(self):
        self._clock[0] += self._seconds
        return self._trainer.train_interval()


def set_clocks(monkeypatch, clock):
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(width.time, name, lambda: clock[0])


@pytest.fixture
def measured(recipe, monkeypatch):
    """`choose_width` where an interval takes what a function of the width says."""
    clock = [0.0]
    set_clocks(monkeypatch, clock)

    def choose(seconds, **more):
        make = lambda recipe, wide: Paced(recipe, wide, seconds, clock)  # noqa: E731
        return choose_width(recipe, make, **more)

    return choose


def test_the_fastest_width_is_found_between_the_steps(measured):
    choice = measured(lambda k: 1e-3 * (k if k <= 32 else 32 * (k / 32) ** 2) + 1e-2)
    assert choice.width == 32
    assert [tried.width for tried in choice.tried] == [1, 4, 16, 64, 8, 32]
    assert "slower" in choice.ended


def test_solo_wins_where_fusing_does_not_pay(measured):
    choice = measured(lambda k: 0.01 * k * (1.0 if k == 1 else 1.3))
    assert choice.width == 1
    assert [tried.width for tried in choice.tried] == [1, 4, 16, 2]


def test_fusing_that_costs_much_once_may_pay_later(measured):
    choice = measured(lambda k: 5e-3 if k == 1 else 4e-2 + 1e-4 * k, most=64)
    assert choice.width == 64


def test_of_almost_equal_widths_the_narrowest_is_taken(measured):
    choice = measured(lambda k: 1e-3 * k * (1.0 if k < 4 else 0.5 - 1e-3 * math.log(k)), most=16)
    assert choice.width == 4


def test_a_group_has_to_save_what_its_trials_cannot_learn_from_each_other(measured):
    faster = lambda k: 1e-3 * k ** (0.95 if k > 1 else 1.0)  # noqa: E731
    assert measured(faster, most=10).width > 2
    assert measured(faster, most=10, trials=30).width <= 2
    thrice_as_fast = lambda k: 1e-3 * k * (1.0 if k == 1 else 0.3)  # noqa: E731
    assert measured(thrice_as_fast, most=10, trials=30).width > 1


def test_no_width_above_what_is_useful(measured):
    choice = measured(lambda k: 0.1, most=20)
    assert choice.width == 20
    assert max(tried.width for tried in choice.tried) == 20


def test_measuring_ends_where_it_would_take_long(measured):
    choice = measured(lambda k: 1.0 * k)
    assert choice.width == 1
    assert "longer than 20 s" in choice.ended


def test_the_memory_budget_ends_the_search(measured):
    choice = measured(lambda k: 0.1, memory=0)
    assert choice.width == 1
    assert "would need more than" in choice.ended


def test_a_width_that_runs_out_of_memory_is_not_taken(recipe, monkeypatch):
    monkeypatch.setattr(width, "SECONDS", math.inf)  # however slow this machine is just now

    def make(recipe, wide):
        if wide >= 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trainer_of(recipe, wide)

    choice = choose_width(recipe, make)
    assert choice.width < 16
    assert "ran out of memory" in choice.ended


def test_too_little_memory_for_one_training_is_said_as_such(recipe):
    def make(recipe, wide):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        choose_width(recipe, make)


def test_the_hosts_memory_errors_end_the_search_too(recipe):
    def make(recipe, wide):
        if wide >= 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return trainer_of(recipe, wide)

    assert choose_width(recipe, make).width < 4


class Examples(Dataset):
    """`reading` seconds for each, on a clock of its own."""

    def __init__(self, clock=None, reading=0.0):
        self.clock, self.reading = clock or [0.0], reading

    def __len__(self):
        return 15  # fewer than a measurement asks for

    def __getitem__(self, i):
        self.clock[0] += self.reading
        return torch.full((4,), float(i)), i % 2


@pytest.mark.parametrize(("reading", "width"), [(0.0, 1), (0.1, 16)])
def test_a_group_reads_streamed_data_once(monkeypatch, reading, width):
    clock = [0.0]
    data = Examples(clock, reading)
    program = classification(
        model=net, train=data, validation=(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1])),
        test=False, batch_size=8, epochs=2, lr=1e-3,
    )  # fmt: skip
    recipe = Recipe(program, find_program_sites(program).sites, Objective("nll"))
    set_clocks(monkeypatch, clock)
    slower_fused = lambda k: 1e-2 * k * (1.0 if k == 1 else 1.3)  # noqa: E731
    choice = choose_width(
        recipe, lambda recipe, wide: Paced(recipe, wide, slower_fused, clock), most=16
    )
    assert choice.width == width


def test_the_device_here_has_memory():
    assert free_memory(torch.device("cpu")) > 2**20


def test_a_choice_survives_json(measured):
    choice = measured(lambda k: 0.1, most=4)
    assert WidthChoice.from_json(choice.to_json()) == choice


class Storage:
    def __init__(self):
        self.kept = {}

    def remember_width(self, device, fingerprint, width):
        self.kept[device, fingerprint] = width

    def recall_width(self, device, fingerprint):
        return self.kept.get((device, fingerprint))


def studied(trainer="fused", wide="auto", trials=60, **training):
    training["width"] = wide
    spec = StudySpec.parse(
        {"name": "x", "program": "x.py", "training": training, "budget": {"trials": trials}}
    )
    row = SimpleNamespace(meta={"trainer": trainer, "fingerprint": {"x.py": "1"}})
    return SimpleNamespace(spec=spec, row=row, storage=Storage())


def test_a_worker_measures_once_and_remembers(recipe, monkeypatch):
    study = studied(trials=24)
    first = make_trainer(recipe, study)
    assert first.width <= 8
    (kept,) = study.storage.kept.values()
    assert kept["width"] == first.width
    monkeypatch.setattr("droptune.trainers.fused.choose_width", None)
    assert make_trainer(recipe, study).width == first.width


def test_a_group_keeps_within_the_memory_that_the_study_file_gives(recipe, monkeypatch):
    taken = []
    monkeypatch.setattr(width, "used_memory", lambda device, reset=False: sum(taken))
    made = width._trainings

    def trainings(recipe, wide):
        taken.append(wide * 2**20)
        return made(recipe, wide)

    monkeypatch.setattr(width, "_trainings", trainings)
    monkeypatch.setattr(width, "SECONDS", math.inf)
    study = studied(memory=5 / 1024)
    make_trainer(recipe, study)
    (kept,) = study.storage.kept.values()
    assert {tried["width"] for tried in kept["tried"]} <= {1, 2, 4}
    assert "would need more than" in kept["ended"]


def test_what_was_asked_for_is_not_measured(recipe):
    assert isinstance(make_trainer(recipe, studied(trainer="solo")), Solo)
    assert isinstance(make_trainer(recipe, studied(wide=1)), Solo)
    fused = make_trainer(recipe, studied(wide=3))
    assert isinstance(fused, Fused)
    assert fused.width == 3
    assert make_trainer(recipe, studied(wide=3), 2).width == 2


def test_a_group_is_never_wider_than_a_third_of_the_trials():
    assert widest(studied(trials=60).spec) == 20
    assert widest(studied(trials=9).spec) == 8
    assert widest(studied(trials=100_000).spec) == 256
