"""Are the verdict's intervals right? Simulated studies, whose truth is known.

    python benchmarks/calibration.py [--studies 2000] [--whole 600] [--out calibration.json]

`interval`: one comparison on fixed seeds, over the sizes of its sources of noise.
`rule`: the best of N noisy trials is chosen, then compared by the sequential rule (arrays only).
`whole`: the real planner and judge on whole studies, search to verdict, with the response surface.

Wanted: 95 % ± 2 of the intervals cover; "better" in at most 5 % of studies where dropout does
nothing; power as `statistics.operating` computes it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))

from simulated import World, confirm, make_spec, search

from droptune.verdict.statistics import operating, paired, settled, verdict_share
from droptune.verdict.verdict import judge

SCHEDULE = (3, 5, 10)
NOISES = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "heavy tails (t3)": lambda rng, size: rng.standard_t(3, size) / np.sqrt(3),
    "skewed (exponential)": lambda rng, size: rng.exponential(1, size) - 1,
}


def interval(studies: int) -> list[dict]:
    """Coverage of `paired` for crossed noise of seeds, examples and their interaction."""
    rows = []
    for seeds in (3, 5, 10):
        for of_seed, of_example, of_both in ((1, 0, 0), (0.3, 5, 5), (1, 10, 0), (1, 5, 15)):
            rng, covered, examples = np.random.default_rng(1), 0, 200
            for _ in range(studies):
                noise = of_seed * rng.standard_normal((seeds, 1))
                noise = noise + of_example * rng.standard_normal(examples)
                noise = noise + of_both * rng.standard_normal((seeds, examples))
                found = paired(noise)
                covered += found.low <= 0 <= found.high
            rows.append(
                {
                    "seeds": seeds,
                    "noise": f"seed {of_seed}, example {of_example}, both {of_both}",
                    "covered": covered / studies,
                }
            )
    return rows


def rule(studies: int) -> list[dict]:
    """Choice of the best of 60, then the sequential rule on validation, the interval on test."""
    rows = []
    for name, noise in NOISES.items():
        for gain, spread in ((0.0, 0.0), (0.3, 1.0), (1.0, 1.0), (4.0, 1.0)):
            for of_example in (0.0, 2.0, 6.0):
                rng = np.random.default_rng(2)
                made = [_ruled(rng, noise, gain, spread, of_example) for _ in range(studies)]
                columns = (np.array(column) for column in zip(*made, strict=True))
                truth, low, high, optimistic, seeds = columns
                rows.append(
                    {
                        "noise": name,
                        "gain": gain,
                        "example noise": of_example,
                        "covered": float(np.mean((low <= truth) & (truth <= high))),
                        "covered on validation": float(np.mean(optimistic)),
                        "better": float(np.mean(low > 0)),
                        "worse": float(np.mean(high < 0)),
                        "seeds": float(seeds.mean()),
                    }
                )
    return rows


def _ruled(rng, noise, gain, spread, of_example, trials=60, front=3, choice=3, seed_sd=0.3):
    loss = rng.exponential(1, trials) * spread - gain  # no dropout is at 0
    loss[0] = -gain
    biased = loss + rng.normal(0, 0.1, trials)  # what this validation set makes of it
    runners = np.argsort(biased + seed_sd * noise(rng, trials))[:front]
    means = [(biased[i] + seed_sd * noise(rng, choice)).mean() for i in runners]
    winner = runners[int(np.argmin(means))]
    pair = seed_sd * (noise(rng, SCHEDULE[-1]) - noise(rng, SCHEDULE[-1]))
    seen = -biased[winner] + rng.normal(0, 0.1) + pair
    for look, seeds in enumerate(SCHEDULE):
        why = settled(seen[:seeds], SCHEDULE, look)
        if why is not None:
            break
    tested = -loss[winner] + pair[:seeds, None] + of_example * rng.standard_normal(200)
    tested = tested + of_example * rng.standard_normal((seeds, 200))
    share = verdict_share(look, SCHEDULE, decided=why == "decided")
    found = paired(tested, share=share)
    own = paired(seen[:seeds], share=share)
    optimistic = own.low <= -loss[winner] <= own.high
    return -loss[winner], found.low, found.high, optimistic, seeds


def whole(studies: int) -> list[dict]:
    """Whole studies through the real planner and judge."""
    rows = []
    for gain in (0.0, 0.02, 0.04, 0.1):
        for share, lr_matters in ((0.3333, True), (1.0, True), (1.0, False)):
            made = [_judged(number, gain, share, lr_matters) for number in range(studies)]
            rows.append({"gain": gain, "share": share, "lr matters": lr_matters, **_summary(made)})
            if not lr_matters:
                rows[-1]["power computed"] = operating(gain / PAIR_SD, SCHEDULE).power
            print(rows[-1], flush=True)
    return rows


PAIR_SD = 0.02 * np.sqrt(2)  # of the difference of two trainings of one seed, in `World`
TWIN = "none at the winner's lr"


def _summary(made) -> dict:
    verdicts = [verdict for *_, verdict in made]
    main = [(verdict.comparison("none"), truths[0]) for truths, _, verdict in made]
    twin = [(verdict.comparison(TWIN), truths[1]) for truths, _, verdict in made]
    lost = np.mean([lost for _, lost, _ in made], axis=0)
    holds = lambda pairs: float(  # noqa: E731
        np.mean([c.difference.low <= t <= c.difference.high for c, t in pairs if c is not None])
    )
    return {
        "covered": holds(main),
        "covered at the winner's lr": holds(twin),
        "better": float(np.mean([v.outcome == "better" for v in verdicts])),
        "worse": float(np.mean([v.outcome == "worse" for v in verdicts])),
        "above none": float(np.mean([c.outcome == "better" for c, _ in main])),
        "search flattered by": float(np.mean([v.curse.excess for v in verdicts])),
        "seeds": float(np.mean([c.difference.seeds for c, _ in main])),
        "winner's lr costs": float(lost[0]),
        "none's lr costs": float(lost[1]),
        "power computed": "",
    }


def _judged(number: int, gain: float, share: float, lr_matters: bool):
    """A study where any dropout gains the same, so that the truth is known whatever is chosen.

    Where the learning rate does not matter, test examples add no noise either: then the power
    against no dropout is that of the sequential rule alone.
    """

    def of_lr(lr):
        return 0.02 * np.log10(lr / 1.7e-3) ** 2 if lr_matters else 0.0

    def loss(rates, lr):
        return 0.5 + of_lr(lr) - (gain if sum(rates.values()) > 0 else 0.0)

    rng = np.random.default_rng([3, number])
    noise = 0.05 if lr_matters else 0.0
    quiet = {"validation_sd": 0.002 if lr_matters else 0.0, "examples": 100}
    world = World(loss, rng, salt=number, example_sd=noise, interaction_sd=noise, **quiet)
    evidence = confirm(world, search(world, make_spec(confirm={"share": share}), trials=25))
    verdict = judge(evidence)
    ours = world.truth(verdict.winner.assignment)
    truths = []
    for label in ("none", TWIN):
        other = verdict.comparison(label)
        truths.append(np.nan if other is None else world.truth(other.assignment) - ours)
    lost = [of_lr(verdict.winner.assignment.lr), of_lr(verdict.comparison("none").assignment.lr)]
    return truths, lost, verdict


def table(rows: list[dict]) -> str:
    """Rows of equal keys as a Markdown table."""
    head = list(rows[0])
    cell = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(row[k]) for k in head) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="per row of the array parts")
    parser.add_argument("--whole", type=int, default=400, help="per row of the whole studies")
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    given = parser.parse_args()
    results = {}
    for name, part, size in (
        ("interval", interval, given.studies),
        ("rule", rule, given.studies),
        ("whole", whole, given.whole),
    ):
        started = time.perf_counter()
        results[name] = part(size) if size else []
        if results[name]:
            print(f"\n{name}, {size} studies a row, {time.perf_counter() - started:.0f} s")
            print(table(results[name]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
