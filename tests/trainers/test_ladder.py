"""The stages of progressive distillation, from a recipe or the command line, and what is refused."""

import json

import pytest
import yaml

from sentences import check_refused
from trainers.config import load_config
from trainers.ladder import MATCH, ladder, top
from trainers.progressive import ProgressiveConfig

LIST = [{"from": 128, "steps": 32, "images": 100}, {"steps": 8, "images": 200, "lr": 5e-5}, {"steps": 1, "images": 300}]


def test_halving():
    """from, from / 2, ..., to; the last two of them may have images of their own; each begins where the one before it ended."""
    rungs = ladder({"from": 32, "to": 1, "images": 100, "few_images": 250}, 1e-3)
    assert [r.steps for r in rungs] == [16, 8, 4, 2, 1] and {r.factor for r in rungs} == {2}
    assert [r.images for r in rungs] == [100, 100, 100, 250, 250]
    assert [r.start for r in rungs] == [0, 100, 200, 300, 550] and rungs[-1].end == 800
    assert {r.lr for r in rungs} == {1e-3} and len({r.name for r in rungs}) == 5
    assert [r.steps for r in ladder({"from": 24, "to": 3, "images": 1, "lr": 0.5}, 1.0)] == [12, 6, 3]
    assert ladder({"from": 2, "to": 1, "images": 1, "lr": 0.5}, 1.0)[0].lr == 0.5


def test_explicit_stages():
    """Each stage says its steps; how many of its teacher's are one of its own follows; a learning rate may be its own."""
    rungs = ladder(LIST, 1e-4)
    assert [(r.steps, r.factor, r.images, r.start, r.lr) for r in rungs] == [(32, 4, 100, 0, 1e-4), (8, 4, 200, 100, 5e-5), (1, 8, 300, 300, 1e-4)]
    assert top(LIST) == 128 and top({"from": 64}) == 64


def test_a_match_stage_comes_first():
    """It takes the teacher's number of steps and joins none; all others begin later by its images."""
    match, *rungs = ladder(LIST, 1e-4, 64)
    assert (match.name, match.steps, match.factor, match.images, match.start, match.lr) == (MATCH, 128, 0, 64, 0, 1e-4)
    assert [r.start - 64 for r in rungs] == [r.start for r in ladder(LIST, 1e-4)]


@pytest.mark.parametrize("stages", [{"from": 16, "to": 2, "images": 640, "few_images": 1280, "lr": 2e-4}, LIST], ids=["halving", "list"])
def test_recipe_and_command_line_give_the_same_stages(tmp_path, stages):
    """Either form as YAML in a recipe or as JSON after --stages, which replaces the recipe's as a whole, of whichever form that is."""
    recipes = {}
    for name, content in {"asked": stages, "halving": {"from": 8, "to": 1, "images": 8}, "list": LIST[:1]}.items():
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump({"method": "progressive", "stages": content}))
    found = [load_config(ProgressiveConfig, [], str(recipes["asked"]), "progressive")]
    found += [load_config(ProgressiveConfig, [*option], str(recipes[name]), "progressive")
              for name in ("halving", "list") for option in (("--stages", json.dumps(stages)), (f"--stages={json.dumps(stages)}",))]
    assert [config.stages for config in found] == [stages] * 5
    assert found[0].rungs == ladder(stages, 1e-4)


def test_numbers_as_people_write_them(tmp_path):
    """1e5 and 1e-4 are numbers in a recipe too, though YAML takes them for text."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: progressive\nstages: {from: 4, to: 1, images: 1e5, few_images: 2.5e5, lr: 1e-4}\n")
    rungs = load_config(ProgressiveConfig, [], str(recipe), "progressive").rungs
    assert [(r.images, r.lr) for r in rungs] == [(250_000, 1e-4)] * 2
    assert load_config(ProgressiveConfig, ["--stages", '{"from": 2, "to": 1, "images": 1e6}'], str(recipe), "progressive").rungs[0].images == 1_000_000


def halving(**changes):
    return {"from": 64, "to": 1, "images": 100, **changes}


def listed(*more, **first):
    return [{"from": 64, "steps": 16, "images": 100, **first}, *more]


@pytest.mark.parametrize("stages, words", [
    (None, ("stages is None", "`from`")), ({}, ("stages is {}", "`from`")), ([], ("stages is []", "`from`")),
    ("many", ("stages is many", "`from`")), ([[64, 1]], ("`from`",)), (halving(**{"from": 0}), ("from 0", "whole number above 0")),
    (halving(**{"from": 6.5}), ("from 6.5",)), (halving(**{"from": True}), ("from True",)), (halving(to=0), ("to 0", "whole number above 0")),
    (halving(to=-1), ("to -1",)), (halving(to="one"), ("to one",)), ({"from": 64, "images": 8}, ("to None",)),
    (halving(to=64), ("from 64 steps to 64", "must go down")), (halving(to=128), ("from 64 steps to 128", "must go down")),
    (halving(to=3), ("from 64 steps to 3", "a list of stages", "take from 48")),
    (halving(**{"from": 12, "to": 2}), ("from 12 steps to 2", "take from 8")), (halving(images=0), ("images 0", "whole number above 0")),
    (halving(images=0.5), ("images 0.5",)), (halving(images=float("nan")), ("images nan",)), (halving(images=float("inf")), ("images inf",)),
    (halving(images=[8]), ("images [8]",)), ({"from": 64, "to": 1}, ("images None",)), (halving(few_images=0), ("few_images 0",)),
    (halving(lr=0), ("lr 0", "above 0")), (halving(lr=-1e-4), ("lr -0.0001",)), (halving(lr="fast"), ("lr fast",)),
    (halving(lr=None), ("lr None",)), (halving(lr=float("inf")), ("lr inf",)), (halving(imagse=3), ("'imagse'", "did you mean images?")),
    (halving(few_image=3), ("'few_image'", "did you mean few_images?")), (halving(steps=32), ("'steps'",)), (halving(**{"3": 3}), ("'3'",)),
    (listed(steps=64), ("64 steps after 64", "fewer than the one before")), (listed(steps=128), ("128 steps after 64",)),
    (listed(steps=20), ("20 steps after 64", "no multiple", "take 16")), (listed({"steps": 16, "images": 8}), ("16 steps after 16", "fewer")),
    (listed({"steps": 32, "images": 8}), ("32 steps after 16",)), (listed({"steps": 6, "images": 8}), ("6 steps after 16", "take 4")),
    (listed({"step": 8, "images": 8}), ("'step'", "did you mean steps?")), (listed({"steps": 8}), ("images None",)),
    (listed({"images": 8}), ("steps None",)), (listed({"from": 16, "steps": 8, "images": 8}), ("'from'",)),
    (listed({"steps": 8, "to": 4, "images": 8}), ("'to'",)), (listed(8), ("stages has 8", "{steps: 32, images: 100000}")),
    (listed({"steps": 8, "images": 8, "lr": 0}), ("lr 0",)), (listed({"steps": 8, "images": 8.5}), ("images 8.5",)),
], ids=str)
def test_stages_that_cannot_be_are_one_sentence(stages, words):
    """Each is refused with what is wrong, its value, and where there is one, the nearest thing that would do."""
    with check_refused("stages", *words):
        ladder(stages, 1e-4)
