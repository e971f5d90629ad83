"""DDPM pretraining in one process."""

from dataclasses import replace

import pytest
import torch

from models import hub
from models.noise import Noise
from models.sampling import draw
from models.schedules import expand
from trainers.config import DataConfig
from trainers.data import Batch, load_images
from trainers.ddpm import DDPM, DdpmConfig
from trainers.dmd import DMD, DmdConfig
from trainers.ema import EmaConfig
from trainers.engine import Cluster
from trainers.launch import Plan
from trainers.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SMALL = {"type": "SmallUNet", "model_channels": 8, "channel_mult": [1, 2]}
CONTEXT = {"type": "ContextUNet", "n_feat": 8, "levels": 100}
OPTIM = OptimConfig(lr=1e-3, eps=1e-4)


def trainer(out, images=96, **settings) -> DDPM:
    settings = dict(network=SMALL, levels=100, beta_end=0.1, optimizer=OPTIM, sampling_steps=5) | settings
    config = DdpmConfig(out=str(out), images=images, **settings)
    config = replace(config, loop=replace(config.loop, batch=16, log_every=16))
    config.check(1)
    return DDPM(config, Cluster(DDPM.networks, Plan.read(None)), load_images(config.data))


def built(out, **settings) -> DDPM:
    made = trainer(out, **settings)
    made.build()
    return made


def batch(made, n=16, start=0) -> Batch:
    device = made.cluster.device
    images, labels = made.images.take(range(n))
    return Batch(images.to(device), {"labels": labels.to(device)}, Noise(0, 0, range(start, start + n), device))


def state(made) -> dict:
    """Weights and buffers, of the network and of its average."""
    average = {f"average.{n}": t.clone() for n, t in made.ema.gather().items()}
    return {n: t.detach().clone() for n, t in made.network.module.state_dict().items()} | average


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_of_an_exact_gaussian_is_the_closed_form(tmp_path, prediction):
    """Data N(m, s^2): the posterior mean's error of eps is alpha^2 s^2 / (alpha^2 s^2 + sigma^2), that of v is s^2 over the same, averaged over t."""
    made, m, s = built(tmp_path, prediction=prediction), 0.3, 0.6
    schedule, device = made.schedule, made.cluster.device

    def exact(x_t, t, cond):
        alpha, sigma = (expand(c, x_t) for c in schedule.alpha_sigma(t))
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)

    made.network, n = exact, 4000
    noise = Noise(0, 0, range(n), device)
    x0 = m + s * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    found = float(made.loss(Batch(x0, None, noise))["loss"])
    alpha, sigma = schedule.alpha_sigma(torch.arange(1, 101, dtype=torch.float64))
    expected = (s**2 * (alpha**2 if prediction == "eps" else 1) / (alpha**2 * s**2 + sigma**2)).mean()
    assert abs(found / float(expected) - 1) < 0.02


def test_loss_is_the_error_of_the_networks_own_output(tmp_path):
    """With the noise of this step, the loss is the mean of |eps - what the raw network says|^2, and t is one of 1..T."""
    made = built(tmp_path, network={**SMALL, "dropout": 0.0})
    b = batch(made)
    found = made.loss(b)["loss"]
    noise = batch(made).noise
    t = made.schedule.time(noise.uniform())
    eps = noise.normal(1, 8, 8)
    x_t = made.schedule.add_noise(b.images, eps, t)
    assert torch.allclose(found, (made.network.module.backbone(x_t, t - 1, b.cond) - eps).square().mean(), rtol=1e-4)
    assert torch.equal(t, t.round()) and t.min() >= 1 and t.max() <= 100


def test_every_level_is_drawn_equally_often(tmp_path):
    """t is uniform over 1..T, both ends with it."""
    made = built(tmp_path)
    t = made.schedule.time(Noise(0, 0, range(20_000)).uniform())
    counts = torch.bincount(t.long(), minlength=101)
    assert counts[0] == 0 and len(counts) == 101 and 130 < int(counts[1:].min()) and int(counts[1:].max()) < 270


@pytest.mark.parametrize("network", [{**SMALL, "dropout": 0.3}, CONTEXT], ids=["dropout", "batchnorm"])
def test_resume_is_bit_for_bit(tmp_path, network):
    """Weights, averages and the statistics of BatchNorm, with labels dropped and with dropout."""
    ends = []
    for name, stops in (("whole", (96,)), ("parts", (48, 96))):
        for images in stops:
            made = trainer(tmp_path / name, images=images, network=network, label_dropout=0.2)
            made.fit()
        ends.append(state(made))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_accumulation_changes_nothing(tmp_path):
    """Two microbatches of 8 take the same steps as one batch of 16."""
    ends = []
    for parts in (1, 2):
        made = trainer(tmp_path / str(parts), optimizer=replace(OPTIM, accumulation=parts))
        made.fit()
        ends.append(state(made))
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=1e-5) for n in ends[0])


@pytest.mark.parametrize("network", [SMALL, CONTEXT], ids=["small", "context"])
def test_the_result_is_a_teacher(tmp_path, network):
    """OUT/model is the average with the main rank's statistics; it loads, samples by DDIM, and says whether it can be guided."""
    made = trainer(tmp_path, network=network, label_dropout=0.1)
    made.fit()
    about, loaded = hub.description(str(tmp_path)), hub.load_denoiser(str(tmp_path))
    average = made.ema.gather()
    assert all(torch.equal(t, average[n]) for n, t in loaded.state_dict().items()) and not loaded.training
    assert all(torch.equal(average[n], b.cpu()) for n, b in made.network.module.named_buffers())
    assert about["sampler"] == {"type": "ddim", "steps": 5} and about["unconditional"] and about["trained"]["method"] == "ddpm"
    samples, labels = draw(loaded, about, range(12), 12)
    assert samples.shape == (12, 1, 8, 8) and samples.isfinite().all() and labels.tolist() == [i % 10 for i in range(12)]


@pytest.mark.parametrize("network, prediction", [(SMALL, "eps"), (SMALL, "v"), (CONTEXT, "eps")], ids=["eps", "v", "batchnorm"])
def test_it_is_distilled_by_dmd(tmp_path, network, prediction):
    """One step from the last level, in float32; the fake score's loss is the error of eps; statistics of BatchNorm stay the teacher's."""
    trainer(tmp_path / "teacher", network=network, prediction=prediction).fit()
    paths = dict(teacher=str(tmp_path / "teacher"), out=str(tmp_path / "run"))
    config = DmdConfig(**paths, images=64, gan_weight=0.1, fake_updates=2, generator=OPTIM, fake_score=OPTIM)
    config = replace(config, loop=replace(config.loop, batch=16))
    config.check(1)
    made = DMD(DMD.prepare(config), Cluster(DMD.networks, Plan.read(None)), load_images(config.data))
    made.build()
    assert made.timesteps == (100.0,)
    before = {n: b.clone() for n, b in made.teacher.named_buffers()}

    b, x_gen = batch(made), torch.randn(16, 1, 8, 8, device=made.cluster.device)
    found, noise = made.fake_loss((b, x_gen))["denoising"], batch(made).noise
    t, eps = made.schedule.time(noise.uniform()), noise.normal(1, 8, 8)
    alpha, sigma = (expand(c, eps) for c in made.schedule.alpha_sigma(t))
    x_t = alpha * x_gen + sigma * eps
    eps_fake = (x_t - alpha * made.fake_score.module.denoiser(x_t, t, b.cond)) / sigma
    assert torch.allclose(found, (eps_fake - eps).square().mean(), rtol=1e-3)

    start, gaps = {n: p.detach().clone() for n, p in made.generator.module.named_parameters()}, []
    for i in range(4):
        gaps.append(made.step(batch(made, start=16 * i)).get("generator/score_gap"))
        made.images_seen += 16
    assert gaps[0] == 0 and 0 < gaps[2] < 10 and not any(e.refusals.any() for e, _ in made.engines.values())
    assert any(not torch.equal(p, start[n]) for n, p in made.generator.module.named_parameters())
    for name, prefix in (("generator", ""), ("fake_score", "denoiser.")):
        buffers = dict(made.engines[name][0].module.named_buffers())
        assert all(torch.equal(buffers[prefix + n], value) for n, value in before.items())


def test_training_learns(tmp_path):
    """From the error of a network that says nothing, 1, to less than a third of it."""
    made = built(tmp_path, network={**SMALL, "model_channels": 16}, ema=EmaConfig(sigma_rel=()), optimizer=replace(OPTIM, lr=5e-3))
    losses = []
    for i in range(150):
        losses.append(float(made.step(batch(made, 64, 64 * i))["loss"]))
        made.images_seen += 64
    assert losses[0] > 0.7 and sum(losses[-20:]) / 20 < 0.33


def test_image_sizes_are_the_networks_own_business(tmp_path):
    """28x28, no power of two, is taken where the network takes it."""
    DdpmConfig(out=str(tmp_path), data=DataConfig(resolution=28), network={"type": "ContextUNet", "n_feat": 8}).check(1)


@pytest.mark.parametrize("settings, said", [
    (dict(network={"type": "ContextUnet"}), "ContextUnet is not among EDM2UNet"),
    (dict(network={"n_feat": 8}), "has no type: name one of EDM2UNet"),
    (dict(network={"type": "SmallUNet", "n_feat": 8}), "n_feat"),
    (dict(network={"type": "SmallUNet", "channel_mult": [1] * 6}), "of 6 levels wants img_resolution 8 divisible by 32"),
    (dict(network={"type": "DiffusersUNet", "layers_per_block": 1, "block_out_channels": [32] * 3, "down_block_types": ["DownBlock2D"] * 3,
                   "up_block_types": ["UpBlock2D"] * 3}, data=DataConfig(resolution=6)), "cannot be made for data.resolution 6"),
    (dict(network={"type": "DiffusersUNet", "layers_per_block": 1, "block_out_channels": [32], "down_block_types": ["DownBlock2D"],
                   "up_block_types": ["UpBlock2D"]}, label_dropout=0.1), "label_dropout is 0.1, and this network has no class .* set its null_class"),
    (dict(prediction="x0"), "prediction is 'x0', and must be one of eps, v"),
    (dict(beta_start=0.0), "beta_start is 0.0"), (dict(beta_start=0.5), "must rise"), (dict(levels=0), "levels is 0"),
    (dict(beta_end=0.9), "beta_end is 0.9, which leaves alpha"), (dict(sampling_steps=2000), "sampling_steps is 2000"),
    (dict(label_dropout=1.0), "label_dropout is 1.0"), (dict(label_dropout=0.1, data=DataConfig(classes=0)), "there are no labels to drop"),
    (dict(optimizer=OptimConfig(accumulation=7)), "optimizer.accumulation 7"),
])
def test_what_cannot_work_is_one_sentence(tmp_path, settings, said):
    """Each is refused before any network is built, and names its field."""
    with pytest.raises(Exception, match=said) as error:
        DdpmConfig(out=str(tmp_path), **settings).check(1)
    assert type(error.value).__name__ == "ConfigError" and "\n" not in str(error.value)
