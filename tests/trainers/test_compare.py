"""A ladder's students beside their teacher."""

import json

import pytest

from models import hub
from models.noise import Noise
from models.sampling import DRAW_STREAM, ddim, draw
from test_progressive import trainer
from trainers.compare import ladder_table, students
from trainers.config import ConfigError
from trainers.metrics import frechet_distance

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_each_student_stands_beside_its_teacher_at_the_same_steps(tiny_teacher, tmp_path):
    """Every number is the distance of that model's own samples; undistilled is the teacher by DDIM on the student's times; pictures are written."""
    made = trainer(tiny_teacher, tmp_path)
    made.fit()
    real = made.images.first(200)[0]
    text = ladder_table(str(tmp_path), real, 8, 80, 80, "cpu")
    rows = json.loads((tmp_path / "ladder.json").read_text())
    assert list(rows) == ["teacher", "8", "4", "2", "1"] and "student" not in rows["8"]
    folder = str(tmp_path / "stages/00002")
    drawn, labels = draw(hub.load_denoiser(folder), hub.description(folder), range(80), 80)
    assert rows["2"]["student"]["fd"] == pytest.approx(frechet_distance(drawn, real), rel=1e-4)
    times = hub.description(folder)["sampler"]["times"]
    plain = ddim(hub.load_denoiser(str(tiny_teacher)), Noise(0, DRAW_STREAM, range(80)).normal(1, 8, 8), 2, {"labels": labels}, times=times).clamp(-1, 1)
    assert rows["2"]["undistilled"]["fd"] == pytest.approx(frechet_distance(plain, real), rel=1e-4)
    assert f"| 2 | {rows['2']['student']['fd']:.4g} | {rows['2']['undistilled']['fd']:.4g} |" in text and text in (tmp_path / "ladder.md").read_text()
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("ladder.png", "ladder_samples.png"))


def test_a_run_without_stages_is_one_sentence(tmp_path):
    """It is named, with what it must be a run of."""
    with pytest.raises(ConfigError, match="has no finished stages"):
        students(str(tmp_path))
