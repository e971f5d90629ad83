"""The adversarial last stages of progressive distillation."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from conftest import tiny_denoiser
from models.discriminator import StepDiscriminator
from models.schedules import EDM, CosineVP, DiscreteVP, Flow
from sentences import check_refused
from trainers.config import ConfigError
from trainers.data import batches, load_images
from trainers.engine import Cluster
from trainers.ladder import PAIRED, RELAXED, ladder
from trainers.launch import Plan
from trainers.optim import OptimConfig
from trainers.progressive import AdversarialConfig, Progressive, ProgressiveConfig, renoise

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SCHEDULES = {"cosine": CosineVP(), "discrete": DiscreteVP.cosine(64), "edm": EDM(), "flow": Flow(3.0)}


def trainer(teacher, out, accumulation=1, save_every=0, **settings) -> Progressive:
    """8 steps to 2: a plain stage, then an adversarial one and its relaxed phase, each of three steps of 8 images."""
    adversarial = AdversarialConfig(**{"steps": 2, "relaxed_images": 24, "weight": 0.5, **settings})
    optim = OptimConfig(lr=1e-3, eps=1e-4, accumulation=accumulation)
    config = ProgressiveConfig(teacher=str(teacher), out=str(out), stages={"from": 8, "to": 2, "images": 24}, adversarial=adversarial, student=optim, disc=optim)
    config = replace(config, loop=replace(config.loop, batch=8, log_every=1000, save_every=save_every))
    config.check(1)
    return Progressive(Progressive.prepare(config), Cluster(Progressive.networks, Plan.read(None)), load_images(config.data))


def weights(engine) -> dict:
    return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_stages_with_a_judge():
    """Of so many steps and fewer, each followed by its relaxed phase, which has the same teacher and leaves the stage's folder."""
    rungs = ladder({"from": 8, "to": 1, "images": 8}, 1.0, judged=2, relaxed_images=4)
    assert [(r.folder, r.steps, r.judge, r.teacher, r.start, r.end) for r in rungs] == [
        ("00004", 4, None, -1, 0, 8), ("00002-paired", 2, PAIRED, 0, 8, 16), ("00002", 2, RELAXED, 0, 16, 20),
        ("00001-paired", 1, PAIRED, 2, 20, 28), ("00001", 1, RELAXED, 2, 28, 32)]
    assert [r.folder for r in ladder({"from": 8, "to": 1, "images": 8}, 1.0, judged=1)] == ["00004", "00002", "00001"]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_more_noise_on_noisy_data_is_noisier_data(schedule):
    """Renoising x_s = alpha_s x0 + sigma_s eps gives the mean and the variance of x_d, at the time that it says."""
    s = schedule.time(torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64))
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    angle = torch.atan2(sigma_s, alpha_s) + torch.tensor([0.0, 0.1, 0.2])
    ones, none = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    (kept, d), (added, _) = renoise(schedule, ones, s, angle, none), renoise(schedule, none, s, angle, ones)
    alpha_d, sigma_d = schedule.alpha_sigma(d.double())
    assert_close(kept.flatten().double() * alpha_s, alpha_d, rtol=1e-5, atol=1e-6)
    assert_close((kept.flatten().double() * sigma_s) ** 2 + added.flatten().double() ** 2, sigma_d**2, rtol=1e-4, atol=1e-6)
    assert (d.double() >= s - 1e-4).all() and d[2] > s[2]


def test_the_verdict_depends_on_the_source_and_on_no_decoder():
    """Another source, another verdict; without one there is a verdict too. What no verdict depends on is not trained."""
    disc = StepDiscriminator(tiny_denoiser()).eval()
    disc.train_what_takes_part(1, 8, 10)
    x, t, cond = torch.randn(4, 1, 8, 8), torch.ones(4), {"labels": torch.arange(4)}
    paired = [disc(x, t, cond, source, 2 * t) for source in torch.randn(2, 4, 1, 8, 8)]
    assert not torch.allclose(paired[0], paired[1]) and disc(x, t, cond).shape == paired[0].shape == (4,)
    trained = {n for n, p in disc.named_parameters() if p.requires_grad}
    assert any(n.startswith("disc.") for n in trained) and any(".enc." in n for n in trained) and not any(".dec." in n or "out_" in n for n in trained)
    disc(x, t, cond).sum().backward()
    assert all(p.grad is not None for p in disc.parameters() if p.requires_grad)  # DDP waits for each of them, with a source or without


@pytest.mark.parametrize("stage", [1, 2], ids=[PAIRED, RELAXED])
def test_each_loss_trains_its_own_network(tiny_teacher, tmp_path, stage):
    """The student's loss reaches no weight of the discriminator, and the discriminator's none of the student."""
    made = trainer(tiny_teacher, tmp_path)
    made.build()
    for passed in made.stages()[:stage]:
        made.begin(passed)
        made.images_seen = passed.images
        made.end(passed)
    made.begin(made.stages()[stage])
    batch = next(batches(made.images, made.config.data, 0, 8, 0, 0, 1, made.cluster.device))
    made.landings = []
    with made.disc.frozen():
        losses = made.loss(batch)
        losses["loss"].backward()
    assert_close(losses["loss"], losses["matching"] + 0.5 * losses["gan"])
    assert all(p.grad is None for p in made.disc.module.parameters()) and any(p.grad.abs().sum() > 0 for p in made.student.parameters if p.grad is not None)
    made.student.optimizer.zero_grad()
    made.disc_loss(made.landings[0])["loss"].backward()
    assert all(p.grad is None for p in made.student.parameters) and all(p.grad is not None for p in made.disc.parameters)


def test_judged_stages_train_both_and_begin_anew(tiny_teacher, tmp_path):
    """The discriminator starts each of its stages from the same weights, without moments, and moves; the relaxed phase starts from the paired one's student."""
    made, seen = trainer(tiny_teacher, tmp_path), []
    begin, end = made.begin, made.end
    made.begin = lambda stage: (begin(stage), seen.append(("begin", weights(made.disc), weights(made.student), made.disc.state()[1]["steps"])))
    made.end = lambda stage: (seen.append(("end", weights(made.disc), weights(made.student), made.disc.state()[1]["steps"])), end(stage))
    made.fit()
    (_, _, _, _), (_, untouched, _, _), paired, paired_end, relaxed, relaxed_end = seen
    assert same(paired[1], relaxed[1]) and same(paired[1], untouched) and not same(paired[1], paired_end[1]) and not same(relaxed[1], relaxed_end[1])
    assert same(paired_end[2], relaxed[2]) and not same(relaxed[2], relaxed_end[2])
    assert [paired[3], paired_end[3], relaxed[3], relaxed_end[3]] == [0, 3, 0, 3]
    assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == ["00002", "00002-paired", "00004"]


def test_accumulation_changes_nothing(tiny_teacher, tmp_path):
    """Two microbatches of four end where one of eight does."""
    ends = []
    for accumulation in (1, 2):
        made = trainer(tiny_teacher, tmp_path / str(accumulation), accumulation)
        made.fit()
        ends.append(weights(made.student) | {f"disc.{n}": p for n, p in weights(made.disc).items()})
    assert all((ends[0][n] - ends[1][n]).abs().max() < 1e-5 for n in ends[0])


def test_a_judged_run_resumes_bit_for_bit(tiny_teacher, tmp_path):
    """Stopped within the paired stage, and again within the relaxed one, both networks end in the same bits."""
    ends = []
    for name, stops in (("whole", (72,)), ("parts", (40, 64, 72))):
        for images in stops:
            made = trainer(tiny_teacher, tmp_path / name)
            made.config = replace(made.config, images=images)
            made.fit()
        ends.append((weights(made.student), weights(made.disc)))
    assert same(ends[0][0], ends[1][0]) and same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name, value", [("steps", -1), ("weight", -0.1), ("matching_weight", -1.0), ("relaxed_images", -8), ("relaxed_images", 12)])
def test_settings_that_cannot_work_are_one_sentence(tiny_teacher, tmp_path, name, value):
    """Before any network is built, the field or the stage is named."""
    with check_refused(name if value != 12 else "relaxed", str(value)):
        trainer(tiny_teacher, tmp_path, **{name: value})


def test_rates_of_accumulation_must_agree(tiny_teacher, tmp_path):
    """Both networks are updated on the same microbatches."""
    made = trainer(tiny_teacher, tmp_path)
    with pytest.raises(ConfigError, match="disc.accumulation is 2, and student.accumulation 1"):
        replace(made.config, disc=replace(made.config.disc, accumulation=2)).check(1)
