"""DMD in one process: the algorithm, and the mistakes that re-implementations make."""

from dataclasses import replace

import pytest
import torch

from conftest import save_teacher, tiny_denoiser
from models import hub
from models.noise import Noise
from models.sampling import few_step
from trainers.config import ConfigError
from trainers.data import Batch, load_images
from trainers.dmd import DMD, DmdConfig, RegressionConfig
from trainers.engine import Cluster
from trainers.launch import Plan
from trainers.losses import dmd_gradient, dmd_loss
from trainers.optim import OptimConfig
from trainers.pairs import make_pairs
from trainers.trainer import TrainingError

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
OPTIM = OptimConfig(lr=1e-3, eps=1e-4)


def trainer(teacher, tmp_path, **settings) -> DMD:
    settings = dict(timesteps=(10.0,), fake_updates=2, gan_weight=0.1, generator=OPTIM, fake_score=OPTIM) | settings
    config = DmdConfig(teacher=str(teacher), out=str(tmp_path / "run"), images=24, **settings)
    config = replace(config, loop=replace(config.loop, batch=8, log_every=8), eval=replace(config.eval, samples=16))
    config.check(1)
    made = DMD(DMD.prepare(config), Cluster(DMD.networks, Plan.read(None)), load_images(config.data))
    made.build()
    return made


def batch(made, start=0, n=8) -> Batch:
    rows = list(range(start, start + n))
    device = made.cluster.device
    images, labels = made.images.take(rows)
    return Batch(images.to(device), {"labels": labels.to(device)}, Noise(0, 0, rows, device))


def steps(made, count):
    for _ in range(count):
        yield made.step(batch(made, made.images_seen))
        made.images_seen += 8


def snapshot(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def moved(module, before) -> bool:
    return any(not torch.equal(p, before[n]) for n, p in module.named_parameters())


def count_calls(module) -> list[int]:
    """Batch sizes of the calls of a network, as they are made."""
    calls = []
    module.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    return calls


def test_fake_updates_count_besides_the_generators(tiny_teacher, tmp_path):
    """fake_updates 3 is one generator update and three of the fake score in three iterations."""
    made = trainer(tiny_teacher, tmp_path, fake_updates=3)
    seen = [[k for k in ("generator/loss", "fake_score/loss") if k in m] for m in steps(made, 6)]
    assert [len(s) for s in seen] == [2, 1, 1, 2, 1, 1]
    counted = [e.state()[1]["steps"] for e in (made.generator, made.fake_score)]
    assert counted == [2, 6]


@pytest.mark.parametrize("turn", [0, 1])
def test_an_iteration_makes_no_pass_that_it_need_not(tiny_teacher, tmp_path, turn):
    """One generator call, whose images serve both updates; teacher and score only in the generator's turn; D in one batch of both."""
    made = trainer(tiny_teacher, tmp_path)
    made.images_seen = 8 * turn
    generator, teacher = count_calls(made.generator.module), count_calls(made.teacher)
    fake, disc = count_calls(made.fake_score.module), count_calls(made.fake_score.module.disc)
    made.step(batch(made))
    assert generator == [8] and teacher == [[8], []][turn]
    assert fake == [[8, 8, 8, 16], [8, 16]][turn]  # score, D for the generator | denoising, D on real and fake
    assert disc == [[8, 16], [16]][turn]


def test_guidance_is_one_batched_pass(tiny_teacher, tmp_path):
    """A guided teacher is called once, with twice the batch."""
    made = trainer(tiny_teacher, tmp_path, guidance=2.0)
    calls = count_calls(made.teacher)
    made.step(batch(made))
    assert calls == [16]


def test_the_first_gradient_is_zero(tiny_teacher, tmp_path):
    """While the fake score is still the teacher, distribution matching pulls nowhere, exactly."""
    made = trainer(tiny_teacher, tmp_path)
    first, _, third = steps(made, 3)
    assert first["generator/score_gap"] == 0 and third["generator/score_gap"] > 0


def test_the_generators_turn_leaves_nothing_in_the_fake_score(tiny_teacher, tmp_path):
    """Its GAN gradient crosses the fake score's encoder and head: neither moves, neither keeps a gradient."""
    made = trainer(tiny_teacher, tmp_path, matching_weight=0.0)
    before, generator = snapshot(made.fake_score.module), snapshot(made.generator.module)
    made.made = []
    with made.fake_score.frozen():
        made.generator.update(lambda b: made.generator_loss(b, 0), [batch(made)])
    assert not moved(made.fake_score.module, before) and all(p.grad is None for p in made.fake_score.module.parameters())
    assert moved(made.generator.module, generator)  # so the adversarial gradient did arrive


def test_the_fake_scores_turn_leaves_the_generator_alone(tiny_teacher, tmp_path):
    """In an iteration without generator update only the fake score and its head move."""
    made = trainer(tiny_teacher, tmp_path)
    made.images_seen = 8
    generator, fake, teacher = snapshot(made.generator.module), snapshot(made.fake_score.module), snapshot(made.teacher)
    made.step(batch(made))
    assert not moved(made.generator.module, generator) and not moved(made.teacher, teacher) and moved(made.fake_score.module, fake)
    assert any(n.startswith("disc") and not torch.equal(p, fake[n]) for n, p in made.fake_score.module.named_parameters())


def test_the_teacher_runs_without_graph_and_never_changes(tiny_teacher, tmp_path):
    """What the teacher returns carries no graph, even where the generator's does; its weights stay."""
    made = trainer(tiny_teacher, tmp_path)
    outputs, before = [], snapshot(made.teacher)
    made.teacher.register_forward_hook(lambda m, args, out: outputs.append(out))
    list(steps(made, 3))
    assert len(outputs) == 2 and not any(o.requires_grad for o in outputs) and not moved(made.teacher, before)


def test_generator_loss_is_the_papers(tiny_teacher, tmp_path):
    """The generator's loss, from the same noise, is dmd_loss of the hand-computed gradient; the score is taken of noised images."""
    made = trainer(tiny_teacher, tmp_path, gan_weight=0.0)
    list(steps(made, 2))
    b, made.made = batch(made, 16), []
    with made.fake_score.frozen():
        loss = made.generator_loss(b, 0)["loss"]
    noise = Noise(0, 0, list(range(16, 24)), made.cluster.device)
    x_gen = few_step(made.generator.module, noise.normal(1, 8, 8), (10.0,), b.cond).detach()
    t = made.schedule.time(0.02 + 0.96 * noise.uniform())
    x_t = x_gen + t.view(-1, 1, 1, 1) * noise.normal(1, 8, 8)
    with torch.no_grad():
        gradient = dmd_gradient(x_gen, made.teacher(x_t, t, b.cond), made.fake_score.module(x_t, t, b.cond).x0)
    assert torch.allclose(loss, dmd_loss(x_gen, gradient).mean(), atol=1e-7)
    assert torch.allclose(made.made[0], x_gen, atol=1e-6)


def test_dropout_is_off_in_all_three_networks(tmp_path):
    """With a teacher built with dropout, two passes of each network agree: noise in one would be noise in the difference of scores."""
    made = trainer(save_teacher(tmp_path / "t", tiny_denoiser(dropout=0.5)), tmp_path)
    b = batch(made)
    t = torch.full((8,), 1.0, device=made.cluster.device)
    for network in (made.generator, made.teacher, lambda *a: made.fake_score(*a).x0):
        assert torch.equal(network(b.images, t, b.cond), network(b.images, t, b.cond))


def test_all_samples_of_a_batch_are_independent(tiny_teacher, tmp_path):
    """The gradient that reaches one image does not depend on its neighbours: the normaliser is per sample."""
    made = trainer(tiny_teacher, tmp_path, gan_weight=0.0)
    list(steps(made, 2))
    grads = []
    for b in (batch(made, 16), batch(made, 16, n=2)):
        made.made, found = [], []
        made.generate = lambda b, depth, f=found: f.append(few_step(made.generator.module, b.noise.normal(1, 8, 8), (10.0,), b.cond).detach()
                                                           .requires_grad_()) or f[0]
        with made.fake_score.frozen():
            (made.generator_loss(b, 0)["loss"] * len(b.images)).backward()
        grads.append(found[0].grad)
    assert torch.allclose(grads[0][:2], grads[1], atol=1e-7) and grads[1].abs().max() > 0


# --- more than one step: backward simulation


def test_backward_simulation_stops_at_the_depth_and_starts_from_pure_noise(tiny_teacher, tmp_path):
    """At depth s the generator is called s + 1 times, on what sampling would give it there, with gradient through the last call only."""
    times = (10.0, 2.0, 0.5)
    made = trainer(tiny_teacher, tmp_path, timesteps=times)
    for depth in range(3):
        b, with_graph = batch(made), []
        hook = made.generator.module.register_forward_hook(lambda m, args, out, w=with_graph: w.append(out.requires_grad))
        x_gen = made.generate(b, depth)
        hook.remove()
        noise = batch(made).noise
        draws = [noise.normal(1, 8, 8) for _ in range(depth + 1)]
        expected = few_step(made.generator.module, draws[0], times[:depth + 1], b.cond, draws[1:])
        assert with_graph == [False] * depth + [True] and torch.allclose(x_gen, expected, atol=1e-6)


def test_the_depth_is_shared_by_all_and_uniform(tiny_teacher, tmp_path):
    """It is a function of (seed, images seen), never of the rank, and every step of the generator gets its share."""
    made = trainer(tiny_teacher, tmp_path, timesteps=(10.0, 2.0, 0.5, 0.1))
    drawn = []
    for i in range(400):
        made.images_seen = 8 * i
        drawn.append(made.depth())
    assert {made.depth() for _ in range(5)} == {drawn[-1]}
    assert all(70 < drawn.count(d) < 130 for d in range(4))


# --- regression (DMD v1)


def test_regression_matches_the_teachers_image_for_the_same_noise_and_label(tiny_teacher, tmp_path):
    """With only the regression term, the generator comes closer to the stored pairs, which carry their own labels."""
    make_pairs(str(tiny_teacher), str(tmp_path / "pairs"), 8)
    made = trainer(tiny_teacher, tmp_path, gan_weight=0.0, matching_weight=0.0, fake_updates=1, generator=replace(OPTIM, lr=0.01),
                   regression=RegressionConfig(weight=1.0, pairs=str(tmp_path / "pairs"), distance="l2"))
    losses = [float(m["generator/regression"]) for m in steps(made, 60)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_pairs_of_another_teacher_are_refused(tiny_teacher, tmp_path):
    """Even where sizes agree: the pairs' own teacher is known by its weights."""
    other = save_teacher(tmp_path / "other", tiny_denoiser(seed=1))
    make_pairs(str(other), str(tmp_path / "pairs"), 8)
    with pytest.raises(ConfigError, match="were made by another teacher"):
        trainer(tiny_teacher, tmp_path, regression=RegressionConfig(weight=1.0, pairs=str(tmp_path / "pairs"), distance="l2"))


# --- what is refused


@pytest.mark.parametrize("settings, said", [
    (dict(timesteps=(100.0,)), "timesteps is .* runs from 0 to 80"),
    (dict(timesteps=(1.0, 2.0)), "must fall from noise to data"),
    (dict(fake_updates=0), "fake_updates is 0"),
    (dict(score_range=(0.9, 0.1)), "score_range"),
    (dict(regression=RegressionConfig(weight=0.25)), "regression.pairs names no folder"),
    (dict(guidance=2.0, teacher="UNGUIDED"), "was never trained without labels"),
    (dict(teacher="/nowhere"), "/nowhere: there is no model there"),
])
def test_what_cannot_work_is_one_sentence(tiny_teacher, tmp_path, settings, said):
    """Each is refused before any network is built, and names its field."""
    if settings.get("teacher") == "UNGUIDED":
        settings = {**settings, "teacher": str(save_teacher(tmp_path / "t", tiny_denoiser(), unconditional=False))}
    config = replace(DmdConfig(teacher=str(tiny_teacher), out=str(tmp_path / "run")), **settings)
    with pytest.raises((ConfigError, hub.ModelError), match=said) as error:
        config.check(1)
        DMD.prepare(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, value", [("resolution", 16), ("channels", 3), ("classes", 0)])
def test_a_teacher_that_disagrees_with_the_data_is_refused(tiny_teacher, tmp_path, field, value):
    """Resolution, channels and classes are compared before anything is built."""
    config = DmdConfig(teacher=str(tiny_teacher), out=str(tmp_path / "run"))
    config = replace(config, data=replace(config.data, **{field: value}))
    with pytest.raises(ConfigError, match=f"data.{field} is {value}, and the teacher .* they must agree"):
        DMD.prepare(config)


def test_too_many_refused_updates_stop_the_run(tiny_teacher, tmp_path):
    """After max_refused updates in a row with a loss that is not finite, the run stops and says where the last good checkpoint is."""
    made = trainer(tiny_teacher, tmp_path)
    made.config = replace(made.config, images=80, loop=replace(made.config.loop, max_refused=3, save_every=8))
    loss = made.fake_loss
    made.fake_loss = lambda b: {"loss": loss(b)["loss"] * (float("nan") if made.images_seen >= 24 else 1)}
    with pytest.raises(TrainingError, match="3 updates of fake_score in a row .* last good checkpoint is .*000000000040"):
        made.fit()


# --- evaluation


def test_evaluation_leaves_training_as_it_was(tiny_teacher, tmp_path):
    """The same run with and without evaluation ends in the same weights."""
    ends = []
    for every in (0, 8):
        made = trainer(tiny_teacher, tmp_path / str(every))
        made.config = replace(made.config, loop=replace(made.config.loop, eval_every=every))
        made.fit()
        ends.append(snapshot(made.generator.module))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_the_result_is_a_one_step_generator_that_loads(tiny_teacher, tmp_path):
    """OUT/model holds the average's weights and says how to sample it."""
    made = trainer(tiny_teacher, tmp_path)
    made.fit()
    about, loaded = hub.description(str(made.out)), hub.load_denoiser(str(made.out), made.cluster.device)
    assert about["sampler"] == {"type": "few_step", "timesteps": [10.0]} and about["trained"]["method"] == "dmd"
    average = made.ema.gather()
    assert all(torch.equal(t.cpu(), average[n]) for n, t in loaded.state_dict().items())
