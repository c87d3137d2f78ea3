"""A training's final weights scored on the test set: once, at the end of a confirmation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from droptune.program.examples import Examples
from droptune.trainers.evaluation import Measuring, evaluation_batches, predictor
from droptune.trainers.monte_carlo import draw_alone, dropout_on, measure_passes
from droptune.trainers.recipe import Recipe
from droptune.trainers.slot import Scores, Slot


@torch.no_grad()
def score(recipe: Recipe, weights: Mapping[str, Tensor], slot: Slot) -> Scores:
    """Score a slot's `state_dict` on the test set, or on validation data where there is none."""
    split_seed = slot.training.seeds.split
    split = "test" if recipe.has_test(split_seed) else "validation"
    data = recipe.data(split_seed, split)
    model = recipe.fresh_model(0)
    model.load_state_dict(dict(weights))
    installed = recipe.install(model)
    predict = predictor(recipe, model.eval(), installed)
    measuring = Measuring(recipe.program.metrics, slots=False)
    examples = Examples(recipe.program.task, data.n)
    for batch in evaluation_batches(data, recipe):
        predicted, targets = predict(batch)
        measuring.add(predicted, targets)
        examples.add(predicted, targets)
    metrics = measuring.finish()[0]
    if recipe.mc_passes:
        kept = slot.best_interval if recipe.keeps_best else None
        then = replace(slot, interval=(kept or slot.interval) - 1)
        with dropout_on(model, recipe.sites):
            draw = draw_alone(recipe, model, installed)
            metrics |= measure_passes(recipe, [then], data, draw)[0]
    return Scores(split, metrics, examples.scores())
