"""Whether a training that is stopped and resumed goes on as if it never was: found by trying."""

from __future__ import annotations

from droptune.program.declared import default_values
from droptune.trainers.fusibility import distance, left_by, numbers_of, three_trainings, tried
from droptune.trainers.recipe import Recipe
from droptune.trainers.solo import Solo


def what_is_lost(recipe: Recipe) -> list[str]:
    """What a resumed training of this program does not find again, for people; mostly nothing.

    Tried on a few examples: a second interval by the trainer of the first, and by one that knows
    no more than its snapshot. Raises ProgramError where the program does not train at all.
    """
    training = three_trainings(recipe, default_values(recipe.program.searched))[0]

    def run(tiny: Recipe) -> tuple[Solo, Solo]:
        through, resumed = Solo(tiny), Solo(tiny)
        through.fill(0, training)
        through.train_interval()
        resumed.fill(0, training, through.snapshot(0))
        return through, resumed

    _, both, tolerance = tried(recipe, run)
    left = [left_by(solo, 0, solo.train_interval()[0]) for solo in both]
    through, resumed = (numbers_of(*solo.parts) for solo in both)
    lost = [name for name, number in through.items() if resumed.get(name) != number]
    if lost:
        what = f"{lost[0]} is in no state_dict (a buffer would be)"
    elif distance(*left) > tolerance:
        what = "the model or its optimizer remembers what is in no state_dict"
    else:
        return []
    return [f"a training that is resumed will differ from one that was never stopped: {what}"]
