"""The command `fewstep`, and a real short distillation."""

import json

import pytest
import torch

from conftest import launch, run
from trainers import demo as demonstration
from trainers import pictures


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's teacher and student, a quarter as long."""
    out = tmp_path_factory.mktemp("demo")
    several = () if torch.cuda.is_available() else ("cpu_ddp.yaml",)
    config = several[0] if several else "1gpu.yaml"
    launch(config, "edm2.py", "--mixed_precision", "no", "--", "--out", out / "teacher", "--images=40000", "--optimizer.decay_after_images=16000",
           "--ema.sigma_rel=[0.1,0.05]", "--loop.snapshot_every=8000")
    launch(config, "dmd.py", "--mixed_precision", "no", "--", "--out", out / "student", "--teacher", out / "teacher", "--images=32000")
    return out


def test_a_short_distillation_beats_the_undistilled_network_by_far(demo):
    """One step of the student's average is several times nearer to real digits than one step of its teacher, and as varied as they are."""
    rows, shown = demonstration.measure(f"{demo}/teacher", f"{demo}/student")
    teacher, undistilled, student = (rows[name] for name in ("teacher", "undistilled, 1 step", "student, 1 step"))
    assert undistilled["FD all"] > 3 and teacher["FD all"] < 0.4
    assert student["FD all"] < 0.6 and student["FD held back"] < undistilled["FD held back"] / 5
    assert student["class accuracy"] > 0.9 and student["within-class std"] > 2 * undistilled["within-class std"]
    assert (teacher["network calls"], student["network calls"]) == (35, 1) and rows["real, drawn from train"]["FD all"] < 0.12
    table = demonstration.table(rows)
    assert table.count("\n") == 5 and all(name in table for name in rows)
    pictures.grids(demo / "samples.png", shown)
    assert (demo / "samples.png").stat().st_size > 10_000


def test_distance_falls_while_distilling(demo):
    """The logged distance of the average falls from point to point."""
    curve = [json.loads(line) for line in (demo / "student/metrics.jsonl").read_text().splitlines()]
    fd = [line["fd"] for line in curve if "fd" in line]
    assert len(fd) == 3 and fd[0] > fd[1] > fd[2]
    pictures.progress(demo / "progress.png", [(i, v) for i, v in enumerate(fd)], {"teacher": 0.1})
    assert (demo / "progress.png").is_file()


def test_sample_and_score(demo, tmp_path):
    """A seed's image does not depend on what is drawn with it; the score is the one that training logged."""
    run("fewstep", "sample", demo / "student", "--out", tmp_path / "a.png", "--seeds", "0-15", "--batch", "16")
    run("fewstep", "sample", demo / "student", "--out", tmp_path / "b.png", "--seeds", "0-15", "--batch", "5")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    said = run("fewstep", "score", demo / "student").stdout
    logged = [json.loads(line) for line in (demo / "student/metrics.jsonl").read_text().splitlines()][-1]["fd"]
    assert abs(float(said.split()[4]) - logged) < 1e-3 and "class accuracy" in said


def test_averages_of_other_lengths(demo, tmp_path):
    """`ema` writes a model that samples, also as the guide of another; `sweep` measures several and draws the curve."""
    run("fewstep", "ema", demo / "teacher", "--sigma-rel", "0.2", "--at", "24000", "--out", tmp_path / "weak")
    run("fewstep", "sample", demo / "teacher", "--guidance", "2", "--guide", tmp_path / "weak", "--seeds", "0-3", "--out", tmp_path / "a.png")
    run("fewstep", "sweep", demo / "teacher", "--sigma_rel", "[0.05,0.1]", "--samples", "40", "--split", "test")
    assert [width for width, _ in json.loads((demo / "teacher/sweep.json").read_text())] == [0.05, 0.1]
    assert (demo / "teacher/sweep.png").is_file() and (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("command, said", [
    (("sample", "/nowhere"), "/nowhere: there is no model there"),
    (("sample", "DEMO/student", "--labels", "[10]"), "has classes 0 to 9"),
    (("sample", "DEMO/student", "--seeds", "a-b"), "seeds is 'a-b'"),
    (("score", "/nowhere"), "/nowhere is not a run's folder"),
    (("pairs", "--teacher", "DEMO/student", "--out", "DEMO/p"), "is a few-step student"),
    (("sample", "DEMO/student", "--guidance", "2"), "is a few-step student: its teacher was guided"),
    (("sample", "DEMO/teacher", "--guidance", "2"), "name a weaker model with --guide"),
    (("ema", "DEMO/student"), "has no stored averages"),
    (("ema", "DEMO/teacher", "--sigma-rel", "0.4"), "sigma_rel is 0.4"),
])
def test_bad_input_is_one_sentence(demo, command, said):
    """One line on stderr, code 2."""
    done = run("fewstep", *(word.replace("DEMO", str(demo)) for word in command), check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_demos_are_named_bare():
    """`fewstep demo progressive` is understood, and another word is refused with those that are."""
    done = run("fewstep", "demo", "elsewhere", check=False)
    assert done.returncode == 2 and "--what" in done.stderr and "progressive" in done.stderr and "Traceback" not in done.stderr
