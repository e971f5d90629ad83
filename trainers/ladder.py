"""The stages of progressive distillation as data: which students there are, from how many steps of what, and for how long."""

import math
from dataclasses import dataclass
from typing import Any

from trainers.config import nearest, require

PAIRED, RELAXED = "paired", "relaxed"  # what a discriminator is shown: where a step starts and lands, or where it lands alone
MATCH = "match"  # the name of the stage before the ladder, in which the student learns its teacher's own prediction


@dataclass(frozen=True)
class Rung:
    """A student of `steps` steps, each worth `factor` of its teacher's. Trained on images `start` .. `start + images` of the run.

    It starts from the weights of the rung before it. Its teacher is the rung number `teacher`, -1 for the pretrained network.
    """

    name: str
    folder: str  # under OUT/stages
    steps: int
    factor: int  # 0: no step is joined, the teacher's prediction is learnt as it is
    images: int
    start: int
    lr: float
    teacher: int
    judge: str | None = None  # PAIRED: a discriminator that sees where a step started; RELAXED: one that does not

    @property
    def end(self) -> int:
        return self.start + self.images


def top(stages: dict | list) -> int:
    """How many steps the teacher takes. Raises ConfigError where the stages do not say it."""
    first = stages[0] if isinstance(stages, list) and stages else stages
    require(isinstance(first, dict) and "from" in first, f"stages is {stages}, and its first part must have `from`: the teacher's number of steps")
    return _count(first, "from")


def ladder(stages: dict | list, lr: float, match_images: int = 0, judged: int = 0, relaxed_images: int = 0) -> list[Rung]:
    """{"from": 1024, "to": 1, "images": N} halves step by step; [{"from": 128, "steps": 32, "images": N}, {"steps": 8, ...}] is explicit.

    few_images: of the stages with one and two steps, which want more. lr: a stage's own. match_images: of the stage before the ladder, 0
    for none. judged: stages of so many steps and fewer are adversarial, and each is followed by a relaxed one of `relaxed_images`, unless
    that is 0. Raises ConfigError, in one sentence, for stages that cannot be.
    """
    steps = top(stages)
    entries = _halvings(stages) if isinstance(stages, dict) else stages
    start, rungs = 0, []
    if match_images:
        rungs.append(Rung(MATCH, MATCH, steps, 0, match_images, 0, lr, -1))
        start = match_images
    for entry in entries:
        _check_keys(entry, {"from", "steps", "images", "lr"} if entry is entries[0] else {"steps", "images", "lr"})
        fewer, images = _count(entry, "steps"), _count(entry, "images")
        require(fewer < steps, f"stages has {fewer} steps after {steps}: each stage must have fewer than the one before")
        require(steps % fewer == 0, f"stages has {fewer} steps after {steps}, which is no multiple of them: take {_below(fewer, steps)}")
        own = _number(entry, "lr") if "lr" in entry else lr
        require(0 < own < math.inf, f"stages has lr {entry.get('lr', lr)}, and it must be a number above 0")
        judge, relaxes = PAIRED if fewer <= judged else None, fewer <= judged and relaxed_images > 0
        taught = dict(steps=fewer, factor=steps // fewer, lr=own, teacher=len(rungs) - 1)
        rungs.append(Rung(f"{fewer}-step", f"{fewer:05d}{'-paired' if relaxes else ''}", images=images, start=start, judge=judge, **taught))
        start, steps = start + images, fewer
        if relaxes:
            rungs.append(Rung(f"{fewer}-step, relaxed", f"{fewer:05d}", images=relaxed_images, start=start, judge=RELAXED, **taught))
            start += relaxed_images
    return rungs


def _halvings(stages: dict) -> list[dict]:
    """from, from / 2, ..., to."""
    _check_keys(stages, {"from", "to", "images", "few_images", "lr"})
    start, end, images = _count(stages, "from"), _count(stages, "to"), _count(stages, "images")
    few = _count(stages, "few_images") if "few_images" in stages else images
    require(end < start, f"stages goes from {start} steps to {end}: it must go down")
    factor = start // end
    require(start % end == 0 and factor & (factor - 1) == 0,
            f"stages goes from {start} steps to {end}, which halving does not reach: give a list of stages, or take from {_halving_near(start, end)}")
    common = {"lr": stages["lr"]} if "lr" in stages else {}
    return [{**({"from": start} if n == 1 else {}), "steps": start >> n, "images": few if start >> n <= 2 else images, **common}
            for n in range(1, factor.bit_length())]


def _halving_near(start: int, end: int) -> int:
    n = end
    while 2 * n <= start:
        n *= 2
    return n if n > end else 2 * end


def _below(fewer: int, steps: int) -> int:
    """The divisor of `steps` that is nearest to `fewer`."""
    return min((d for d in range(1, steps) if steps % d == 0), key=lambda d: abs(d - fewer))


def _check_keys(entry: Any, allowed: set[str]) -> None:
    require(isinstance(entry, dict), f"stages has {entry!r}, and a stage must be like {{steps: 32, images: 100000}}")
    for key in entry:
        require(key in allowed, f"stages has {key!r}, which is none of {', '.join(sorted(allowed))}{nearest(str(key), sorted(allowed))}")


def _count(entry: dict, key: str) -> int:
    """A positive whole number."""
    value = _number(entry, key)
    require(value.is_integer() and value > 0, f"stages has {key} {entry.get(key)}, and it must be a whole number above 0")
    return int(value)


def _number(entry: dict, key: str) -> float:
    """A number, NaN for anything else. 1e6 is one too, which YAML takes for text."""
    value = entry.get(key)
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
