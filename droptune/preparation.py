"""What has to be known of a program before a study of it is created, or a worker trains it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from droptune.errors import ConfigurationError, SiteError, SpecError
from droptune.program.data import InMemory, Streamed, seeded
from droptune.program.declared import extremes
from droptune.program.loading import load_program
from droptune.program.program import Program
from droptune.program.soundness import calls_eagerly
from droptune.program.source import fingerprint
from droptune.search.pruning import make_pruner
from droptune.search.sampling import FIRST_WAVE, Proposer
from droptune.sites.installed import find_or_insert_sites, find_program_sites
from droptune.sites.site import Discovery, Site
from droptune.space.space import Space
from droptune.spec.spec import StudySpec
from droptune.trainers.fusibility import fusible
from droptune.trainers.recipe import Recipe
from droptune.trainers.resumption import what_is_lost
from droptune.training import NewTraining
from droptune.verdict.wording import counted

_HOW = {"fused": "several trials as one program", "solo": "one trial after another"}


@dataclass(frozen=True)
class Prepared:
    """All that is known of a study before anything is written."""

    spec: StudySpec
    root: Path
    program: Program
    discovery: Discovery
    space: Space
    intervals: int
    meta: dict[str, Any]

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.discovery.sites

    @property
    def baselines(self) -> list[NewTraining]:
        """The baselines that the budget has trials for, each at its first learning rate first."""
        return self.space.baselines(self.spec.baselines, self.spec.full_trials)

    def describe(self) -> str:
        """Sites, rates and how they will train, in one line."""
        sites, rates = counted(len(self.sites), "site"), counted(len(self.space.rates), "rate")
        trainer = self.meta["trainer"]
        how = f"{trainer}, {_HOW[trainer]} ({self.meta['trainer_reason']})"
        return f"{sites}, {rates} searched; trains {how}"

    def notes(self) -> list[str]:
        """What the user should know before spending anything."""
        notes = [f"warning: {warning}" for warning in self.discovery.warnings]
        notes += [*self._shorter(), *self._little_to_search(), *self._several()]
        notes += [
            f"not tunable: {u.module or 'model'}: {u.operation} ({u.reason})"
            for u in self.discovery.untunable
        ]
        if made := self.meta["splits_made"]:
            samples = self.meta["samples"]
            sizes = ", ".join(f"{samples[name]} for {name}" for name in made)
            notes.append(f"split off once from the training data by the study's seed: {sizes}")
        return notes

    def _shorter(self) -> Iterator[str]:
        """That the study trains less long than its program: the best rates depend on that."""
        epochs, meant = self.spec.epochs or 0, self.program.epochs
        if epochs < meant:
            yield (
                f"warning: trains {counted(epochs, 'epoch')} where the program says {meant}: the "
                "best rates belong to one length of training, and short ones ask for less "
                f"dropout; search with `epochs: {meant}`, or train {epochs} in the end, too"
            )

    def _little_to_search(self) -> Iterator[str]:
        """That the baselines, which come first, leave next to nothing of the budget."""
        budget, wanted = self.spec.full_trials, len(self.space.baselines(self.spec.baselines))
        if budget is None or budget - wanted >= FIRST_WAVE[0]:
            return
        left = f"which leaves {budget - wanted or 'none'} of the budget of {budget} to search"
        if budget < wanted:
            left = f"of which the budget has only the first {budget}: nothing is searched"
        yield (
            f"warning: the baselines alone are {counted(wanted, 'trial')}, {left}; raise the "
            "budget, or lower baselines.trials (learning rates for each)"
        )

    def _several(self) -> Iterator[str]:
        """Which of several objectives the verdict is about."""
        first, *others = (objective.metric for objective in self.spec.objectives)
        if others:
            yield (
                f"several objectives: the search looks for compromises of {first} and "
                f"{', '.join(others)}; confirmations and the verdict are about {first}, the first"
            )


def prepare(spec: StudySpec, root: Path) -> Prepared:
    """Load the program, find its sites, build the space, try whether it fuses; writes nothing.

    Raises ProgramError, SiteError or SpecError, each in one line.
    """
    program = load_program(spec.program, root)
    program.check()
    spec = spec.resolved(program)
    if spec.full_trials == 0:
        raise SpecError(
            f"budget.epochs: {spec.budget.epochs} is less than one training of {spec.epochs} "
            "epochs: raise it"
        )
    discovery = find_program_sites(program, spec.insert)
    if not discovery.sites:
        line = find_or_insert_sites(program)[1]
        how = f"add sites in the study file: {line}" if line else "put nn.Dropout(0.0) into it"
        raise SiteError(f"{spec.program}: no dropout acts in this model; {how}")
    space = Space.of(discovery.sites, spec, program)
    splits = program.splits(0)
    if spec.confirm.splits != "same" and "validation" not in splits.made:
        raise SpecError(
            f"confirm.splits is {spec.confirm.splits}, but {spec.program} gives validation data of "
            "its own, which are never split again: leave validation= out there, or say splits: same"
        )
    recipe = Recipe.of(program, discovery.sites, spec, torch.device("cpu"))
    if any(o.metric == "gap" for o in spec.objectives):
        _check_gap(recipe, splits.train)
    trainer, reason = _trainer(recipe, spec)
    noticed = (*discovery.warnings, *what_is_lost(recipe), *_in_vain(recipe))
    discovery = replace(discovery, warnings=noticed)
    intervals = spec.intervals(program, splits.train.n)
    Proposer.of(spec, space)  # that its sampler and pruner can be made
    make_pruner(spec, intervals)
    samples = {
        "train": splits.train.n,
        "validation": splits.validation.n,
        "test": splits.test.n if splits.test is not None else 0,
    }
    meta = {
        "root": str(root.resolve()),
        "fingerprint": fingerprint(spec.program, root),
        "versions": _versions(),
        "commit": _commit(root),
        "trainer": trainer,
        "trainer_reason": reason,
        "samples": samples,
        "splits_made": list(splits.made),
        "untunable": [untunable.to_json() for untunable in discovery.untunable],
        "warnings": list(discovery.warnings),
        "author_lr": program.lr,
        "chance": _chance(program),
        "space": space.to_json(),
    }
    return Prepared(spec, root, program, discovery, space, intervals, meta)


def _trainer(recipe: Recipe, spec: StudySpec) -> tuple[str, str]:
    if spec.training.trainer == "solo":
        return "solo", "as the study file says"
    tried = fusible(recipe)
    if spec.training.trainer == "fused" and not tried.ok:
        raise ConfigurationError(
            f"training.trainer is fused, and {spec.program} is not: {tried.reason}"
        )
    return ("fused" if tried.ok else "solo"), tried.reason


def _check_gap(recipe: Recipe, train: InMemory | Streamed) -> None:
    if isinstance(train, Streamed):
        raise SpecError(
            "objective: gap is not measured where training data are streamed: give the program its "
            "training data as tensors or arrays, or take another objective"
        )
    if recipe.gap is None:
        listed = ", ".join(recipe.program.metric_names)
        raise SpecError(
            f"objective: gap compares a metric of which it is known what is better, and {listed} "
            "are the program's own: call one of them loss, or take another objective"
        )


def _chance(program: Program) -> float:
    """The loss of an untrained model: what training must not rise far above.

    The highest that searched values make it, on a batch drawn from all the training data (sorted
    ones may begin with what is easy).
    """
    with seeded(0):
        batch, model = program.example_batch(program.batch_size, drawn=True), program.model()
        with calls_eagerly(model.modules())():
            losses = (program.loss(model.train(), batch, v) for v in extremes(program.searched))
            return max(loss.item() for loss in losses)


def _in_vain(recipe: Recipe) -> list[str]:
    """What is searched without an effect, for people; mostly nothing."""
    make, model, lr = recipe.program.optimizer, recipe.fresh_model(0), recipe.program.lr
    low, high = ([g.get("lr") for g in make(model, x).param_groups] for x in (lr, 2 * lr))
    if low != high:
        return []
    return ["optimizer(model, lr) leaves the lr aside that it is given: it is searched in vain"]


def _versions() -> dict[str, str]:
    names = ("droptune", "torch", "optuna", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _commit(root: Path) -> str | None:
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
