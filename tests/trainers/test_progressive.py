"""Progressive distillation in one process: one step is many, hand-over, resume, the match stage, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from conftest import save_teacher, tiny_denoiser
from models import hub
from models.denoiser import Denoiser, Translated
from models.edm2_unet import MPConv
from models.noise import Noise
from models.sampling import GuidedByCondition, ddim, ddim_step, draw
from models.schedules import EDM, CosineVP, DiscreteVP, Flow, expand
from sentences import check_refused
from trainers.config import DataConfig, LoopConfig
from trainers.data import Batch, ImageSet, load_images
from trainers.ema import EmaConfig
from trainers.engine import Cluster
from trainers.ladder import ladder
from trainers.launch import Plan
from trainers.losses import edm_weight, per_sample, progressive_target
from trainers.optim import OptimConfig
from trainers.progressive import MatchConfig, Progressive, ProgressiveConfig, check_ladder, many_steps_in_one, steps_of

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
FEW_BETAS = torch.linspace(1e-3, 0.3, 64, dtype=torch.float64)  # 64 levels, which end at a signal-to-noise ratio of 2e-5
SCHEDULES = {"cosine": CosineVP(), "clipped": CosineVP(20.0), "discrete_cosine": DiscreteVP.cosine(64), "edm": EDM(), "flow": Flow(3.0)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
Z = torch.tensor([-1.5, -0.2, 0.4, 2.0], dtype=torch.float64).reshape(4, 1, 1, 1)
OPTIM = OptimConfig(lr=1e-3, eps=1e-4)
SHORT = {"from": 8, "to": 1, "images": 24}  # three stages of three steps


# --- one step is many, without any network


def of_gaussian(schedule, m=0.3, s=0.6):
    """The exact denoiser of N(m, s^2)."""
    def denoiser(x_t, t, cond=None):
        alpha, sigma = (expand(c, x_t) for c in schedule.alpha_sigma(t.double()))
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)

    denoiser.schedule = schedule
    return denoiser


class Fitted:
    """The exact student of a linear teacher: x0 = p_i x + q_i in its step i, by least squares."""

    def __init__(self, teacher, path):
        self.schedule, self.at, self.lines = teacher.schedule, path[:, 0], []
        for times in path:
            x_t = torch.linspace(-2, 2, 5, dtype=torch.float64).view(-1, 1, 1, 1) * self.schedule.noise_scale(times[0])
            target = many_steps_in_one(teacher, self.schedule, x_t, times.expand(5, -1), None)
            self.lines.append(torch.linalg.lstsq(torch.cat([x_t, torch.ones_like(x_t)], 1).view(5, 2), target.double().view(5, 1)).solution[:, 0])

    def __call__(self, x_t, t, cond=None):
        p, q = torch.stack(self.lines)[(t.double()[:, None] - self.at).abs().argmin(1)].unbind(1)
        return expand(p, x_t) * x_t + expand(q, x_t)


@every_schedule
def test_one_step_of_the_target_is_many_of_the_teacher(schedule):
    """For every step i of students with 8, 2 and 1 steps from 16, 8 and 2, one DDIM step through the target ends where the teacher's own steps do."""
    teacher, grid = of_gaussian(schedule), schedule.grid(16)
    for rung in ladder([{"from": 16, "steps": 8, "images": 1}, {"steps": 2, "images": 1}, {"steps": 1, "images": 1}], 1.0):
        times, path = steps_of(rung, grid)
        for i, visited in enumerate(path):
            x_t = Z * (schedule.noise_scale(visited[0]))
            target = many_steps_in_one(teacher, schedule, x_t, visited.expand(4, -1), None)
            where = x_t
            for t, s in zip(visited[:-1], visited[1:]):
                where = ddim_step(schedule, where, teacher(where, t.expand(4)), t, s)
            assert (visited[0], visited[-1]) == (times[i], times[i + 1]) and len(visited) == rung.factor + 1
            assert_close(ddim_step(schedule, x_t, target, times[i], times[i + 1]), where, rtol=1e-5, atol=1e-5)


@every_schedule
def test_times_of_the_stages_are_nested(schedule):
    """Each student's times are some of its teacher's, from t_max down to 0, never computed anew; its teacher visits all of its own, once."""
    before, every = schedule.grid(16), schedule.grid(16)
    for rung in ladder([{"from": 16, "steps": 8, "images": 1}, {"steps": 2, "images": 1}, {"steps": 1, "images": 1}], 1.0):
        times, path = steps_of(rung, every)
        assert len(times) == rung.steps + 1 and times[0] == schedule.t_max and times[-1] == 0 and (times.diff() < 0).all()
        assert torch.equal(path[:, :-1].flatten(), before[:-1]) and torch.equal(path[:, -1], times[1:])
        before = times
    if isinstance(schedule, EDM):
        assert not set(schedule.grid(8).tolist()) <= set(schedule.grid(16).tolist())  # so that computing them anew would be seen


@every_schedule
@pytest.mark.parametrize("stages", [{"from": 64, "to": 1, "images": 1}, [{"from": 64, "steps": 16, "images": 1}, {"steps": 1, "images": 1}]], ids=["halving", "list"])
def test_ladder_of_exact_students(schedule, stages):
    """Down a ladder of exact students, each as its own teacher's student, one step is the first teacher's 64."""
    teacher, grid = of_gaussian(schedule), schedule.grid(64)
    student = teacher
    for rung in ladder(stages, 1.0):
        times, path = steps_of(rung, grid)
        student = Fitted(student, path)
        assert_close(ddim(student, Z, rung.steps, times=times.tolist()), ddim(teacher, Z, 64), rtol=0, atol=2e-5)


def test_gain_of_the_exact_ladder():
    """On N(m, 1) with the cosine schedule it is cos(pi / 128)^64 = .980906: neither 0, as of one undistilled step, nor 1, as of the ODE."""
    student = of_gaussian(CosineVP(), 0.3, 1.0)
    for rung in ladder({"from": 64, "to": 1, "images": 1}, 1.0):
        student = Fitted(student, steps_of(rung, CosineVP().grid(64))[1])
    (p, q), = student.lines
    assert abs(p - 0.980906) < 2e-6 and abs(p - math.cos(math.pi / 128) ** 64) < 1e-6 and abs(q - 0.3) < 1e-6


# --- trained for real, where the answer is known


class Table(nn.Module):
    """A network of one line for each of 64 noise levels, p_i x + q_i, and what lies between them."""

    def __init__(self, img_resolution, img_channels, label_dim=0, unit=64.0):
        super().__init__()
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, unit=unit)
        self.p, self.q, self.unit = nn.Parameter(torch.zeros(65)), nn.Parameter(torch.zeros(65)), unit

    def forward(self, x, c_noise, cond=None):
        at = (c_noise * self.unit).clamp(0, 64)
        low = at.floor().clamp(max=63).long()
        p, q = (torch.lerp(table[low], table[low + 1], (at - low).to(table)) for table in (self.p, self.q))
        return expand(p, x) * x + expand(q, x)


class Gaussians(ImageSet):
    """Images of independent pixels N(m, s^2)."""

    def __init__(self, config, m=0.3, s=1.0):
        self.config, self.rows, self.labels = config, range(4096), None
        self.pixels = m + s * torch.randn(4096, 1, config.resolution, config.resolution, generator=torch.Generator().manual_seed(0))

    @staticmethod
    def _scale(pixels):
        return pixels


def gaussian_teacher(folder, schedule, prediction, m=0.3, s=1.0):
    """A run's folder with the exact denoiser of N(m, s^2), as a table."""
    discrete = isinstance(schedule, DiscreteVP)
    table = Table(4, 1, unit=1.0 if discrete else 64.0)  # a discrete schedule tells the network its level - 1
    alpha, sigma = schedule.alpha_sigma(torch.arange(65, dtype=torch.float64) + 1 if discrete else torch.arange(65, dtype=torch.float64) / 64)
    total = alpha**2 * s**2 + sigma**2
    line = {"x0": (alpha * s**2 / total, m * sigma**2 / total), "eps": (sigma / total, -alpha * m * sigma / total)}[prediction]
    table.p.data, table.q.data = (c.float() for c in line)
    return save_teacher(folder, Denoiser(table, schedule, prediction))


def gaussian_trainer(teacher, out, stages, **settings):
    config = ProgressiveConfig(teacher=str(teacher), out=str(out), data=DataConfig(resolution=4, classes=0), stages=stages,
                               **{"student": OptimConfig(lr=0.05, betas=(0.9, 0.99)), **settings})
    config = replace(config, loop=replace(config.loop, batch=64, log_every=64 * 50))
    config.check(1)
    return Progressive(Progressive.prepare(config), Cluster(Progressive.networks, Plan.read(None)), Gaussians(config.data))


def line_of(run) -> tuple[float, float]:
    """What a one-step student makes of noise z: p z + q."""
    about, student = hub.description(str(run)), hub.load_denoiser(str(run))
    ends = ddim(student, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), **{k: v for k, v in about["sampler"].items() if k != "type"}).flatten()
    return float(ends[1] - ends[0]) / 2, float(ends.mean())


def test_trained_ladder_has_the_exact_gain(tmp_path, monkeypatch):
    """From 64 steps to one by the trainer itself, stage by stage through its folders: the one-step student multiplies by .9809, to 1e-3, and adds the mean."""
    monkeypatch.setitem(hub.BACKBONES, "Table", Table)
    gaussian_trainer(gaussian_teacher(tmp_path / "teacher", CosineVP(), "x0"), tmp_path / "run", {"from": 64, "to": 1, "images": 64 * 300}).fit()
    gain, mean = line_of(tmp_path / "run")
    assert abs(gain - 0.980906) < 1e-4 and abs(mean - 0.3) < 1e-4


def test_trained_ladder_from_an_eps_teacher_on_another_schedule(tmp_path, monkeypatch):
    """An eps network on linear betas is matched in v on the cosine schedule, its loss falling a thousandfold, and goes down the ladder by
    explicit stages: one step is 64 of the teacher as translated, though at pure noise it has no answer of its own."""
    monkeypatch.setitem(hub.BACKBONES, "Table", Table)
    teacher = gaussian_teacher(tmp_path / "teacher", DiscreteVP(FEW_BETAS), "eps")
    made = gaussian_trainer(teacher, tmp_path / "run", [{"from": 64, "steps": 8, "images": 64 * 300, "lr": 0.03}, {"steps": 1, "images": 64 * 300}],
                            match=MatchConfig(images=64 * 400, prediction="v", schedule="cosine", levels=64))
    losses, step = [], made.step
    made.step = lambda batch: losses.append(step(batch)) or losses[-1]
    made.fit()
    losses = [float(m["loss"]) for m in losses[:400]]
    assert sum(losses[-20:]) < 1e-3 * sum(losses[:20])
    translated, matched = Translated(hub.load_denoiser(str(teacher)), DiscreteVP.cosine(64)), hub.load_denoiser(str(tmp_path / "run/stages/match"))
    assert matched.prediction == "v" and hub.description(str(tmp_path / "run/stages/match"))["sampler"]["steps"] == 64
    ends = [ddim(denoiser, Z.float(), 64) for denoiser in (translated, matched)]
    assert_close(ends[0], ends[1], rtol=0, atol=1e-3)
    (gain, mean), there = line_of(tmp_path / "run"), ends[0].flatten()
    assert abs(gain - float(there[3] - there[0]) / 3.5) < 1e-3 and abs(mean - float(there[0] + 1.5 * gain)) < 1e-3


# --- the trainer's ways: stages, hand-over, learning rate


def trainer(teacher, out, stages=SHORT, save_every=0, batch=8, **settings) -> Progressive:
    config = ProgressiveConfig(teacher=str(teacher), out=str(out), stages=stages, **{"student": OPTIM, **settings})
    config = replace(config, loop=replace(config.loop, batch=batch, log_every=1000, save_every=save_every))
    config.check(1)
    return Progressive(Progressive.prepare(config), Cluster(Progressive.networks, Plan.read(None)), load_images(config.data))


def batch_of(made, start=0, n=8) -> Batch:
    rows = list(range(start, start + n))
    images, labels = made.images.take(rows)
    return Batch(images.to(made.cluster.device), {"labels": labels.to(made.cluster.device)}, Noise(0, 0, rows, made.cluster.device))


def spied(made, name, before=False) -> list[dict]:
    """What a run looks like after (or before) each call of one of its methods."""
    seen, method = [], getattr(made, name)

    def call(*arguments):
        if before:
            seen.append(look(made))
        result = method(*arguments)
        if not before:
            seen.append(look(made))
        return result

    setattr(made, name, call)
    return seen


def look(made) -> dict:
    shards, scalars = made.student.state()
    tensors = {f"{kind}/{s.name}": s.tensor.clone() for kind, found in shards.items() for s in found}
    averages = {f"{name}/{i}": t.clone() for name, some in made.ema.averages.items() for i, t in enumerate(some)}
    return {"images": made.images_seen, "steps": scalars["steps"], "tensors": {**tensors, **averages},
            "weights": {n: t.cpu().clone() for n, t in made.student.module.state_dict().items()}}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def contents(folder) -> dict:
    """The files under a folder's stages/ and model/."""
    return {str(f.relative_to(folder)): f.read_bytes() for part in ("stages", "model") for f in sorted((folder / part).rglob("*.*"))}


@pytest.fixture
def whole(tiny_teacher, tmp_path):
    """A run without interruption, and its end."""
    made = trainer(tiny_teacher, tmp_path / "whole")
    made.fit()
    return made


def test_each_stage_starts_from_its_teacher_and_nothing_else(tiny_teacher, tmp_path):
    """A stage's first weights are those of the folder before it, to the last bit, with no moments and no steps behind them."""
    made = trainer(tiny_teacher, tmp_path / "run")
    begun, ended = spied(made, "begin"), spied(made, "end")
    made.fit()
    folders = [tiny_teacher, *(tmp_path / "run/stages" / name for name in ("00004", "00002"))]
    assert [b["images"] for b in begun] == [0, 24, 48] and [e["steps"] for e in ended] == [3, 3, 3]
    for start, folder in zip(begun, folders):
        parent = hub.load_denoiser(str(folder)).state_dict()
        assert same(start["weights"], {n: t for n, t in parent.items() if not n.startswith("logvar")})
        assert start["steps"] == 0 and not any(n.startswith("exp_avg") for n in start["tensors"])
    for start, end in zip(begun, ended):
        assert not same(start["weights"], end["weights"]) and any(n.startswith("exp_avg/") for n in end["tensors"])
    assert same(begun[1]["weights"], ended[0]["weights"])


def test_the_teacher_is_frozen_folded_and_the_last_student(tiny_teacher, tmp_path):
    """In every stage it is in eval mode, normalised once, without gradient, gives what the student gives at first, and never changes."""
    made = trainer(tiny_teacher, tmp_path / "run")
    begin, end, seen = made.begin, made.end, []

    def begun(stage):
        begin(stage)
        b, t = batch_of(made), torch.full((8,), 3.0, device=made.cluster.device)
        with torch.no_grad():
            assert_close(made.teacher(b.images, t, b.cond), made.student(b.images, t, b.cond), rtol=0, atol=1e-5)
        assert not made.teacher.training and not made.student.module.training
        assert all(m.folded for m in made.teacher.modules() if isinstance(m, MPConv)) and not any(p.requires_grad for p in made.teacher.parameters())
        seen.append([p.clone() for p in made.teacher.parameters()])

    def ended(stage):
        assert all(torch.equal(p, before) for p, before in zip(made.teacher.parameters(), seen[-1], strict=True))
        end(stage)

    made.begin, made.end = begun, ended
    made.fit()
    assert len(seen) == 3 and not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1]) if a.ndim > 1)


def test_learning_rate_falls_to_zero_in_each_stage(tiny_teacher, tmp_path):
    """Linearly, from the stage's own rate at its first step, to one step's share at its last; a warm-up begins anew too."""
    stages, found = [{"from": 8, "steps": 4, "images": 32}, {"steps": 2, "images": 16, "lr": 5e-4}, {"steps": 1, "images": 32}], []
    for warmup in (0, 16):
        made, rates = trainer(tiny_teacher, tmp_path / str(warmup), stages, student=replace(OPTIM, warmup_images=warmup)), []
        step = made.step
        made.step = lambda batch: rates.append(made.student.optimizer.param_groups[0]["lr"]) or step(batch)
        made.fit()
        found.append(rates)
    falling = [1, 0.75, 0.5, 0.25]
    assert found[0] == pytest.approx([1e-3 * f for f in falling] + [5e-4, 2.5e-4] + [1e-3 * f for f in falling])
    assert found[1] == pytest.approx([a * b for a, b in zip(found[0], [0, 0.5, 1, 1, 0, 0.5, 0, 0.5, 1, 1])])


def test_stages_are_models_of_their_own(whole, tiny_teacher):
    """OUT/stages/STEPS loads, says its steps and times, which are some of the teacher's, and draws; the last is OUT/model, byte for byte."""
    every = EDM(sigma_data=0.75).grid(8).tolist()
    for steps in (4, 2, 1):
        folder = str(whole.out / f"stages/{steps:05d}")
        about = hub.description(folder)
        assert about["sampler"] == {"type": "ddim", "steps": steps, "times": every[::8 // steps]} and about["unconditional"] is False
        assert about["trained"]["images"] == {4: 24, 2: 48, 1: 72}[steps] and about["logvar"] is None
        images, labels = draw(hub.load_denoiser(folder), about, range(4), 4)
        assert images.shape == (4, 1, 8, 8) and images.isfinite().all() and labels.tolist() == [0, 1, 2, 3]
    files = contents(whole.out)
    assert {n.removeprefix("stages/00001/"): b for n, b in files.items() if "00001" in n} == {n.removeprefix("model/"): b for n, b in files.items() if n.startswith("model/")}
    assert sorted(p.name for p in (whole.out / "stages").iterdir()) == ["00001", "00002", "00004"]


def test_accumulation_changes_nothing(whole, tiny_teacher, tmp_path):
    """Two microbatches a step end where one does: every sample keeps its own step, noise and time."""
    made = trainer(tiny_teacher, tmp_path / "run", student=replace(OPTIM, accumulation=2))
    made.fit()
    a, b = look(whole)["weights"], look(made)["weights"]
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-6 and not same(a, hub.load_denoiser(str(tiny_teacher)).state_dict())


def test_loss_is_the_papers(tiny_teacher, tmp_path):
    """From the same noise, by hand: i uniform, z_t from the image, two steps of the teacher, the weighted error of the student's x0; of the student alone."""
    made = trainer(tiny_teacher, tmp_path / "run")
    made.build()
    made.begin(made.stages()[0])
    found = made.loss(batch_of(made))["loss"]
    b, grid = batch_of(made), EDM(sigma_data=0.75).grid(8)
    i = (4 * b.noise.uniform()).long().cpu()
    t, mid, s = (grid[2 * i + k].to(made.cluster.device) for k in range(3))
    z = b.images + expand(t, b.images) * b.noise.normal(1, 8, 8)
    with torch.no_grad():
        x1 = made.teacher(z.float(), t.float(), b.cond)
        x2 = made.teacher(ddim_step(made.schedule, z, x1, t, mid).float(), mid.float(), b.cond)
    one = torch.ones_like(t)
    target = progressive_target(x1, x2, (one, t), (one, mid), (one, s))
    error = per_sample((made.student.module(z.float(), t.float(), b.cond) - target).square())
    assert_close(found, (edm_weight(t.float(), 0.75) * error).mean(), rtol=1e-5, atol=0)
    found.backward()
    assert any(p.grad is not None and p.grad.any() for p in made.student.module.parameters())


class Given:
    """Random numbers that are what they are said to be."""

    def __init__(self, *values):
        self.values = torch.tensor(values)

    def uniform(self):
        return self.values


@pytest.mark.parametrize("steps", [1, 3, 5, 64, 1000, 8192])
def test_every_step_is_drawn(tiny_teacher, tmp_path, steps):
    """From the least random number to the greatest, the student's step is one of its own, the first and the last among them, and all are as likely."""
    made = trainer(tiny_teacher, tmp_path / "run")
    made.build()
    made.rung = replace(ladder({"from": 2 * steps, "to": steps, "images": 8}, 1.0)[0])
    made.path = steps_of(made.rung, torch.arange(2 * steps, -1, -1, dtype=torch.float64))[1]

    ends = made.draw_times(Given(0.0, 1 - 2**-24))
    assert ends[0, 0] == 2 * steps and ends[1].tolist() == [2, 1, 0]
    middle = (torch.arange(4 * steps) + 0.5) / (4 * steps)
    assert torch.bincount((made.draw_times(Given(*middle.tolist()))[:, 0] / 2).long(), minlength=steps + 1).tolist() == [0] + [4] * steps


@every_schedule
def test_the_match_stage_draws_pure_noise_and_never_clean_data(tiny_teacher, tmp_path, schedule):
    """Its times run from t_max, where every student starts, to just above 0, where a weight would be infinite: all are finite."""
    made = trainer(tiny_teacher, tmp_path / "run")
    made.rung, made.schedule = ladder(SHORT, 1.0, 8)[0], schedule
    times = made.draw_times(Given(0.0, 0.5, 1 - 2**-24))[:, 0]
    assert times[0].item() == pytest.approx(schedule.t_max) and (times.diff() < 0).all() and times[-1] > 0
    assert made.weight(times).isfinite().all() and (made.weight(times) > 0).all()


def test_average_begins_anew_in_each_stage(tiny_teacher, tmp_path):
    """With profiles, a stage's averages start as its first weights, the first step replaces a power function's, and the stage hands over the first."""
    made = trainer(tiny_teacher, tmp_path / "run", ema=EmaConfig(sigma_rel=(0.2,), halflife=(50.0,)))
    begun, ended, stepped = spied(made, "begin"), spied(made, "end"), spied(made, "step")
    made.fit()
    averages = [{n: t for n, t in state["tensors"].items() if n.startswith("power")} for state in (*begun, *ended, *stepped)]
    masters = [[t for n, t in state["tensors"].items() if n.startswith("master")] for state in (*begun, *ended, *stepped)]

    def equal(i):
        return all(torch.equal(a, b) for a, b in zip(averages[i].values(), masters[i], strict=True))

    for state in begun:
        assert all(torch.equal(t, state["tensors"][n.replace("power-0.200", "halflife-50")]) for n, t in state["tensors"].items() if n.startswith("power"))
    assert all(map(equal, (0, 1, 2))) and not any(map(equal, (3, 4, 5))) and [equal(6 + i) for i in range(9)] == [True, False, False] * 3
    handed = hub.load_denoiser(str(tmp_path / "run/stages/00004")).state_dict()
    assert same(handed, begun[1]["weights"]) and not same(handed, ended[0]["weights"])


# --- going on


class Killed(Exception):
    pass


def die_in(made, name, images) -> None:
    """The process dies as it enters a method, when so many images were seen."""
    method = getattr(made, name)

    def call(*arguments):
        if made.images_seen == images:
            raise Killed
        return method(*arguments)

    setattr(made, name, call)


@pytest.mark.parametrize("method, images, save_every, resumed_at", [
    ("step", 32, 8, 32), ("step", 40, 0, 24), ("step", 24, 0, 24), ("step", 8, 0, 0),
    ("end", 48, 8, 40), ("save", 48, 8, 40), ("save", 24, 0, 0), ("save", 72, 0, 48), ("export", 72, 0, 72),
], ids=lambda v: str(v))
def test_a_run_killed_anywhere_ends_in_the_same_bits(whole, tiny_teacher, tmp_path, method, images, save_every, resumed_at):
    """Inside a stage, before its first step, at its end, after its folder but before the checkpoint: weights, moments and all folders are those of
    a run without interruption."""
    made = trainer(tiny_teacher, tmp_path / "run", save_every=save_every)
    die_in(made, method, images)
    with pytest.raises(Killed):
        made.fit()
    made = trainer(tiny_teacher, tmp_path / "run", save_every=save_every)
    begun = spied(made, "begin", before=False)
    made.fit()
    assert begun[0]["images"] == resumed_at
    assert same(look(made)["tensors"], look(whole)["tensors"]) and look(made)["steps"] == 3
    assert contents(made.out) == contents(whole.out)


@pytest.mark.parametrize("images, stopped", [(16, 24), (24, 48), (64, 72)])
def test_a_signal_at_a_stages_end_loses_nothing(whole, tiny_teacher, tmp_path, images, stopped):
    """A run that is asked to stop leaves at its next report; where that is a stage's last, the student is in its folder, and the same command goes on."""
    made = trainer(tiny_teacher, tmp_path / "run")
    step = made.step

    def asked(batch):
        made.asked_to_stop |= made.images_seen == images
        return step(batch)

    made.step = asked
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    assert made.images_seen == stopped
    made = trainer(tiny_teacher, tmp_path / "run")
    made.fit()
    assert contents(made.out) == contents(whole.out)


@pytest.mark.parametrize("images, steps, folders", [(16, 4, []), (24, 4, ["00004"]), (32, 2, ["00004"]), (48, 2, ["00002", "00004"]), (500, 1, ["00001", "00002", "00004"])])
def test_fewer_images_stop_early_and_more_go_on(whole, tiny_teacher, tmp_path, images, steps, folders):
    """`images` stops inside the ladder or at a stage's end: only finished stages have folders, OUT/model says its steps; without it the run goes on to the same bits."""
    made = trainer(tiny_teacher, tmp_path / "run", images=images)
    made.fit()
    assert made.images_seen == min(images, 72) and hub.description(str(made.out))["sampler"]["steps"] == steps
    assert sorted(p.name for p in (made.out / "stages").glob("*")) == folders
    made = trainer(tiny_teacher, tmp_path / "run")
    made.fit()
    assert contents(made.out) == contents(whole.out)


@pytest.mark.parametrize("images", [8, 24, 40])
def test_asked_for_fewer_images_than_it_has_a_run_stays_what_it_is(whole, tiny_teacher, tmp_path, images):
    """A finished run, started again with fewer images, writes the result that it had: its last student, with that student's times."""
    before = contents(whole.out)
    made = trainer(tiny_teacher, whole.out, images=images)
    made.fit()
    assert contents(made.out) == before


# --- guidance, and the match stage


def calls_by_stage(made, network) -> dict[str, list]:
    """(batch, condition) of each call of the teacher's network, found by `network(teacher)`, in each stage."""
    begin, seen = made.begin, {}

    def begun(stage):
        begin(stage)
        found = seen[stage.name] = []
        network(made.teacher).register_forward_pre_hook(lambda m, args: found.append((len(args[0]), args[2])))

    made.begin = begun
    return seen


def inner(teacher):
    """The network in whatever guides or translates it."""
    while not isinstance(teacher, nn.Module):
        teacher = teacher.denoiser
    return teacher


def test_guidance_is_folded_into_the_first_stage_alone(tiny_teacher, tmp_path):
    """There the teacher is called once a step with twice the batch, half of it without label; later teachers, guided by what they are, with the batch."""
    made = trainer(tiny_teacher, tmp_path / "run", guidance=2.0)
    calls = calls_by_stage(made, inner)
    made.fit()
    assert {name: [n for n, _ in found] for name, found in calls.items()} == {"4-step": [16] * 6, "2-step": [8] * 6, "1-step": [8] * 6}
    labels = calls["4-step"][0][1]["labels"]
    assert (labels[:8] == -1).all() and (labels[8:] >= 0).all() and all((cond["labels"] >= 0).all() for _, cond in calls["2-step"])
    assert hub.description(str(made.out))["unconditional"] is False  # nobody is to guide it once more


def test_guidance_of_one_is_no_guidance(tiny_teacher, tmp_path):
    """At w = 1, the default, the first teacher is the network itself; above it, its images are others."""
    losses = []
    for w in (1.0, 3.0):
        made = trainer(tiny_teacher, tmp_path / str(w), guidance=w)
        made.build()
        made.begin(made.stages()[0])
        assert isinstance(made.teacher, nn.Module) == (w == 1)
        losses.append(made.loss(batch_of(made))["loss"].item())
    assert losses[0] < 0.9 * losses[1]


RANGE = dict(guidance_range=(0.5, 4.0), match=MatchConfig(images=24))


def test_a_strength_that_is_an_input_changes_nothing_at_first(tiny_teacher, tmp_path):
    """The student's new input has no effect before training, to the last bit, whatever the strength; after the match stage it has one."""
    made = trainer(tiny_teacher, tmp_path / "run", **RANGE)
    made.build()
    b, t, teacher = batch_of(made), torch.linspace(0.01, 80, 8, device=made.cluster.device), hub.load_denoiser(str(tiny_teacher), made.cluster.device)
    with torch.no_grad():
        for w in (0.5, 4.0):
            assert torch.equal(made.student(b.images, t, {**b.cond, "guidance": torch.full_like(t, w)}), teacher(b.images, t, b.cond))
    made.fit()
    matched = hub.load_denoiser(str(tmp_path / "run/stages/match"), made.cluster.device)
    low, high = (matched(b.images, t, {**b.cond, "guidance": torch.full_like(t, w)}) for w in (0.5, 4.0))
    assert not torch.equal(low, high)


def test_the_match_stage_learns_each_samples_own_strength(tiny_teacher, tmp_path):
    """Its target is weak + w (strong - weak) with the sample's own w, told to the student too: at w = 1 a student that starts as the teacher has nothing to learn."""
    made = trainer(tiny_teacher, tmp_path / "run", **RANGE)
    made.build()
    made.begin(made.stages()[0])
    assert made.rung.name == "match" and isinstance(made.teacher, GuidedByCondition)
    found, b = made.loss(batch_of(made))["loss"], batch_of(made)
    w = 0.5 + 3.5 * b.noise.uniform()
    t = made.schedule.time(1 - b.noise.uniform().double())
    x_t = made.schedule.add_noise(b.images, b.noise.normal(1, 8, 8), t).float()
    teacher, t = hub.load_denoiser(str(tiny_teacher), made.cluster.device), t.float()
    weak, strong = teacher(x_t, t, {"labels": torch.full_like(b.cond["labels"], -1)}), teacher(x_t, t, b.cond)
    error = per_sample((expand(w - 1, x_t) * (strong - weak)).square())  # of a student that is still `strong`
    assert_close(found, (edm_weight(t, 0.75) * error).mean(), rtol=1e-3, atol=0)
    made.condition = lambda batch: {**batch.cond, "guidance": torch.ones_like(w)}
    assert made.loss(batch_of(made))["loss"] < 1e-6 * found


def test_teacher_and_student_are_told_the_same_strength(tiny_teacher, tmp_path):
    """After the match stage each stage draws strengths from the range, one a sample, for both; the students say their range, and draw during training."""
    made = trainer(tiny_teacher, tmp_path / "run", **RANGE)
    made.config = replace(made.config, loop=replace(made.config.loop, eval_every=24), eval=replace(made.config.eval, samples=8))
    calls, told, student, condition, build = calls_by_stage(made, inner), {}, [], made.condition, made.build
    made.condition = lambda batch: told.setdefault(made.rung.name, []).append(condition(batch)) or told[made.rung.name][-1]
    made.build = lambda: build() or made.student.module.register_forward_pre_hook(lambda m, args: student.append(args[2]))
    made.fit()
    assert list(calls) == ["match", "4-step", "2-step", "1-step"] and [n for n, _ in calls["match"]] == [16] * 3 and "guidance" not in calls["match"][0][1]
    strengths = [cond["guidance"] for conds in told.values() for cond in conds]
    assert len(student) == len(strengths) == 12 and all(a["guidance"] is w for a, w in zip(student, strengths))
    for name in ("4-step", "2-step", "1-step"):
        assert [n for n, _ in calls[name]] == [8] * 6
        assert all(torch.equal(calls[name][2 * i + k][1]["guidance"], told[name][i]["guidance"]) for i in range(3) for k in range(2))
    drawn = torch.cat(strengths)
    assert 0.5 <= drawn.min() < 1 and 3.5 < drawn.max() <= 4 and drawn.unique().numel() > 90
    about = hub.description(str(made.out))
    assert about["guidance"] == [0.5, 4.0] and about["sampler"]["steps"] == 1 and about["backbone"]["guided"] is True
    images = [draw(hub.load_denoiser(str(made.out)), about, range(4), 4, guidance=w)[0] for w in (0.5, 4.0)]
    assert not torch.equal(*images)


def test_a_guided_run_resumes_in_its_match_stage(tiny_teacher, tmp_path):
    """Interrupted in the match stage and after it, with a new input, a run ends in the same bits."""
    whole = trainer(tiny_teacher, tmp_path / "whole", **RANGE)
    whole.fit()
    for images in (16, 24, 40, None):
        made = trainer(tiny_teacher, tmp_path / "run", images=images, **RANGE)
        made.fit()
    assert contents(made.out) == contents(whole.out) and "stages/match/config.json" in contents(made.out)


@pytest.mark.parametrize("prediction, match", [
    ("eps", MatchConfig(images=24, prediction="v", schedule="rescaled")), ("eps", MatchConfig(images=24, prediction="x0", schedule="cosine", levels=32)),
    ("v", MatchConfig(images=24, schedule="cosine", levels=8)),
], ids=["rescaled", "cosine", "cosine-v"])
def test_a_network_is_matched_on_another_schedule(tmp_path, prediction, match):
    """The student takes the prediction and schedule that it is to have, with the teacher's weights, and is asked for both in its folders; guidance is folded in there."""
    torch.manual_seed(0)
    teacher = save_teacher(tmp_path / "teacher", Denoiser(tiny_denoiser().backbone, DiscreteVP(FEW_BETAS), prediction))
    made = trainer(teacher, tmp_path / "run", match=match, guidance=2.0)
    calls = calls_by_stage(made, inner)
    made.fit()
    assert [n for n, _ in calls["match"]] == [16] * 3 and {n for name in calls if name != "match" for n, _ in calls[name]} == {8}
    for name in ("match", "00004", "00001"):
        about = hub.description(str(made.out / "stages" / name))
        schedule = hub.schedule_of(about)
        assert about["prediction"] == (match.prediction or prediction) and schedule.alpha_sigma(schedule.t_max)[0] == 0
        assert about["sampler"]["times"][0] == schedule.t_max == (64 if match.schedule == "rescaled" else match.levels)
    images, _ = draw(hub.load_denoiser(str(made.out)), hub.description(str(made.out)), range(4), 4)
    assert images.isfinite().all()


# --- what is refused


@pytest.mark.parametrize("settings, words", [
    (dict(stages={"from": 2, "to": 1, "images": 20}), ("stages has images 20 for the 1-step stage", "loop.batch 8", "take 24")),
    (dict(match=MatchConfig(images=20)), ("match.images is 20", "loop.batch 8", "take 24")),
    (dict(match=MatchConfig(images=-8)), ("match.images is -8", "below 0")),
    (dict(match=MatchConfig(levels=0)), ("match.levels is 0", "above 0")),
    (dict(match=MatchConfig(prediction="v")), ("match.images is 0", "match stage")),
    (dict(match=MatchConfig(schedule="cosine")), ("match.images is 0",)),
    (dict(guidance_range=(1.0, 4.0)), ("match.images is 0",)),
    (dict(match=MatchConfig(images=8, prediction="eps")), ("match.prediction is 'eps'", "must be v, x0 or both")),
    (dict(match=MatchConfig(images=8, schedule="linear")), ("match.schedule is 'linear'", "teacher, rescaled or cosine")),
    (dict(match=MatchConfig(images=8), guidance=2.0, guidance_range=(1.0, 4.0)), ("guidance is 2.0", "guidance_range is (1.0, 4.0)", "one of the two")),
    (dict(match=MatchConfig(images=8), guidance_range=(4.0, 1.0)), ("guidance_range is (4.0, 1.0)", "must rise")),
    (dict(guidance=2.0, data=DataConfig(classes=0)), ("guidance", "data.classes is 0")),
    (dict(loop=LoopConfig(batch=8, snapshot_every=8)), ("loop.snapshot_every is 8", "leave it at 0")),
    (dict(weight="min_snr"), ("weight is 'min_snr'", "snr_trunc, snr, snr_plus_one, constant")),
    (dict(student=OptimConfig(decay_after_images=10)), ("student.decay_after_images", "leave it at 0")),
    (dict(student=OptimConfig(lr=0.0)), ("student.lr is 0.0", "above 0")),
    (dict(student=OptimConfig(accumulation=3)), ("student.accumulation 3", "loop.batch is 8", "take 9")),
    (dict(ema=EmaConfig(sigma_rel=(0.5,))), ("ema.sigma_rel has 0.5",)),
    (dict(images=0), ("images is 0", "above 0")),
    (dict(stages=None), ("stages is None",)),
], ids=str)
def test_settings_that_cannot_work_are_one_sentence(tmp_path, settings, words):
    """Each is refused before the teacher is looked at, with its field, its value and the mend."""
    config = ProgressiveConfig(out=str(tmp_path), **{"stages": SHORT, "loop": LoopConfig(batch=8), **settings})
    with check_refused(*words):
        config.check(1)


def described(schedule=EDM(), prediction="edm", sampler=None, **changes) -> dict:
    about = hub.describe(Denoiser(tiny_denoiser().backbone, schedule, prediction))
    return {**about, "unconditional": True, "sampler": sampler or {"type": "heun", "steps": 32}, **changes}


DDPM, COARSE, NOISY = DiscreteVP(LINEAR), {"from": 50, "to": 25, "images": 8}, MatchConfig(images=8, schedule="rescaled")
SIX = {"type": "ddim", "steps": 6, "times": EDM().grid(6).tolist()}


@pytest.mark.parametrize("settings, about, words", [
    (dict(stages={"from": 64, "to": 1, "images": 8}), dict(schedule=DiscreteVP(LINEAR, True), prediction="v"), ("64 steps", "1000 levels", "divisor of 1000", "match.levels 1024")),
    (dict(stages={"from": 2000, "to": 1000, "images": 8}), dict(schedule=DiscreteVP(LINEAR, True), prediction="v"), ("2000 steps", "1000 levels", "match.levels 2000")),
    (dict(stages={"from": 64, "to": 1, "images": 8}, match=MatchConfig(8, None, "cosine", 100)), dict(schedule=DDPM, prediction="v"), ("64 steps", "100 levels")),
    (dict(stages=COARSE), dict(schedule=DDPM, prediction="v"), ("signal-to-noise ratio of 4e-05", "not 0", "match.schedule rescaled", "match.images")),
    (dict(stages=COARSE), dict(schedule=DDPM, prediction="eps"), ("signal-to-noise ratio", "match.schedule rescaled")),
    (dict(stages=COARSE, match=NOISY), dict(schedule=DDPM, prediction="eps"), ("predicts eps", "match.prediction v")),
    (dict(stages=COARSE), dict(schedule=DiscreteVP(LINEAR, True), prediction="eps"), ("predicts eps", "match.prediction v", "match.images")),
    (dict(), dict(schedule=CosineVP(6.0), prediction="v"), ("signal-to-noise ratio of 0.0025", "match.schedule cosine")),
    (dict(match=NOISY), dict(schedule=Flow(), prediction="flow"), ("match.schedule is rescaled", "no betas")),
    (dict(match=NOISY), dict(), ("match changes", "EDM network")),
    (dict(match=MatchConfig(8, "both")), dict(schedule=CosineVP(), prediction="v"), ("match.prediction is both", "EDM2UNet", "take v")),
    (dict(match=MatchConfig(8, "v")), dict(), ("match changes", "EDM network")),
    (dict(weight="snr"), dict(schedule=CosineVP(), prediction="v"), ("weight is snr", "snr_trunc")),
    (dict(weight="snr", stages={"from": 8, "to": 2, "images": 8}), dict(schedule=CosineVP(), prediction="v"), ("weight is snr", "first step")),
    (dict(), dict(sampler={"type": "few_step", "timesteps": [80.0]}), ("few-step student", "network it came from")),
    (dict(), dict(sampler=SIX), ("starts from 8 steps", "distilled to 6", "start from 6")),
    (dict(stages={"from": 3, "to": 1, "images": 8}), dict(sampler=SIX), ("distilled to 6", "start from 6")),
    (dict(stages={"from": 6, "to": 3, "images": 8}, match=MatchConfig(8)), dict(sampler=SIX), ("match.images is 8", "distilled to 6", "leave the match stage out")),
    (dict(guidance=2.0), dict(unconditional=False), ("guidance", "never trained without labels", "label_dropout")),
    (dict(RANGE), dict(unconditional=False), ("guidance", "never trained without labels")),
    (dict(RANGE), dict(backbone={"type": "DiffusersUNet"}), ("guidance_range is (0.5, 4.0)", "DiffusersUNet", "give one with guidance")),
    (dict(stages={"from": 6, "to": 3, "images": 8}), dict(sampler=SIX, guidance=[0.5, 4.0]), ("strength of guidance as an input", "network it came from")),
], ids=str)
def test_teachers_that_cannot_be_distilled_so_are_one_sentence(settings, about, words):
    """What a teacher is decides what can be asked of it: its grid, its last signal-to-noise ratio, its prediction, what it was distilled to."""
    with check_refused(*words):
        check_ladder(ProgressiveConfig(teacher="T", **{"stages": SHORT, **settings}), described(**about))


@pytest.mark.parametrize("settings, about", [
    (dict(stages=COARSE, match=MatchConfig(8, "v", "rescaled")), dict(schedule=DDPM, prediction="eps")),
    (dict(stages={"from": 64, "to": 1, "images": 8}, match=MatchConfig(8, "v", "cosine", 1024)), dict(schedule=DDPM, prediction="eps")),
    (dict(match=MatchConfig(8, None, "cosine", 64)), dict(schedule=CosineVP(6.0), prediction="v")),
    (dict(stages={"from": 6, "to": 3, "images": 8}), dict(sampler=SIX)), (dict(weight="snr"), dict()), (dict(), dict(schedule=CosineVP(20.0), prediction="v")),
    (dict(stages=[{"from": 6, "steps": 2, "images": 8}]), dict(schedule=Flow(3.0), prediction="flow")),
], ids=str)
def test_the_mends_that_are_offered_work(settings, about):
    """What those sentences ask for is accepted."""
    check_ladder(ProgressiveConfig(teacher="T", **{"stages": SHORT, **settings}), described(**about))


def test_a_student_goes_on_from_its_own_times(tiny_teacher, tmp_path):
    """A student of four steps is a teacher of four, at the times that it was distilled for, though a grid of four has others."""
    trainer(tiny_teacher, tmp_path / "first", {"from": 8, "to": 4, "images": 8}).fit()
    made = trainer(tmp_path / "first", tmp_path / "second", {"from": 4, "to": 1, "images": 8})
    made.fit()
    every = EDM(sigma_data=0.75).grid(8).tolist()
    assert made.times.tolist() == every[::2] and hub.description(str(made.out / "stages/00002"))["sampler"]["times"] == every[::4]
    with check_refused("starts from 8 steps", "distilled to 4"):
        trainer(tmp_path / "first", tmp_path / "third")
