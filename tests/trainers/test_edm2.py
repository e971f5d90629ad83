"""EDM2 pretraining in one process."""

from dataclasses import replace

import pytest
import torch
import yaml

from conftest import HOUSE
from models.edm2_unet import EDM2UNet, LogVar
from trainers import posthoc
from trainers.config import ConfigError, load_config
from trainers.data import batches, load_images
from trainers.edm2 import EDM2, Edm2Config, NetworkConfig
from trainers.ema import EmaConfig
from trainers.engine import Cluster
from trainers.launch import Plan
from trainers.losses import edm2_loss
from trainers.optim import OptimConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SMALL = NetworkConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16)


def trainer(out, **settings) -> EDM2:
    config = Edm2Config(out=str(out), network=SMALL, sigma_data=0.75, optimizer=OptimConfig(lr=0.01, betas=(0.9, 0.99)), images=160, **settings)
    config = replace(config, loop=replace(config.loop, batch=16, log_every=16, snapshot_every=16))
    config.check(1)
    return EDM2(config, Cluster(EDM2.networks, Plan.read(None)), load_images(config.data))


def weights(made):
    return {n: p.detach().clone() for n, p in made.network.module.named_parameters()}


def test_loss_is_the_published_one_of_this_steps_noise(tmp_path):
    """ln sigma ~ N(P_mean, P_std^2) per sample, weight lambda / e^u, plus u; summed over pixels, mean over the batch."""
    made = trainer(tmp_path)
    made.build()
    batch = next(batches(made.images, made.config.data, 0, 16, 0, 0, 1, made.cluster.device))
    found = made.loss(batch)
    noise = next(batches(made.images, made.config.data, 0, 16, 0, 0, 1, made.cluster.device)).noise
    sigma = (-0.4 + noise.normal()).exp()
    x_t = batch.images + sigma.view(-1, 1, 1, 1) * noise.normal(1, 8, 8)
    score = made.network.module(x_t, sigma, batch.cond)
    expected = edm2_loss(score.x0, batch.images, sigma, score.logvar, 0.75).mean()
    assert torch.allclose(found["edm2_loss"], expected, atol=1e-6) and torch.allclose(found["loss"], 64 * expected, atol=1e-4)


def test_resume_with_dropout_is_bit_for_bit(tmp_path):
    """Dropout draws from a stream of (seed, rank, images seen) too."""
    ends = []
    for name, stops in (("whole", (96,)), ("parts", (48, 96))):
        for images in stops:
            made = trainer(tmp_path / name, label_dropout=0.2)
            made.config = replace(made.config, images=images, network=replace(SMALL, dropout=0.3))
            made.fit()
        ends.append(weights(made))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_label_dropout_trains_some_samples_without_label(tmp_path):
    """About the asked share of labels become -1, and the result says that it can be guided by itself."""
    made = trainer(tmp_path, label_dropout=0.25)
    made.build()
    batch = next(batches(made.images, made.config.data, 0, 800, 0, 0, 1, made.cluster.device))
    dropped = batch.dropping_labels(made.config.label_dropout)["labels"] == -1
    assert 140 < int(dropped.sum()) < 260 and made.description["unconditional"]


def test_reconstructed_average_is_the_one_that_training_would_have_kept(tmp_path):
    """From stored .05 and .10, the average of .075 that a run tracked itself is rebuilt far closer than either, and a stored one exactly."""
    made = trainer(tmp_path, ema=EmaConfig(sigma_rel=(0.05, 0.1, 0.075)))
    made.fit()
    tracked = posthoc.denoiser_tensors(made.ema.gather("power-0.075"))
    for file in (tmp_path / "snapshots").glob("*power-0.075*"):
        file.unlink()
    rebuilt, short, long = (posthoc.reconstruct(str(tmp_path), s) for s in (0.075, 0.05, 0.1))
    error = {name: sum((t[n] - tracked[n]).square().sum() for n in tracked) ** 0.5 for name, t in (("rebuilt", rebuilt), ("short", short), ("long", long))}
    assert error["rebuilt"] < 0.2 * min(error["short"], error["long"])
    exact = posthoc.denoiser_tensors(made.ema.gather("power-0.050"))
    assert all(torch.allclose(short[n], exact[n], atol=2e-3, rtol=1e-3) for n in exact)  # float16 on disk
    assert posthoc.reconstruct(str(tmp_path), 0.1, at=80).keys() == tracked.keys()


@pytest.mark.parametrize("settings, said", [
    (dict(sigma_rel=0.3), "sigma_rel is 0.3, and must lie in"), (dict(sigma_rel=0.0), "sigma_rel is 0.0"), (dict(sigma_rel=0.1, at=81), "at is 81, and .* stored at 16, 32"),
])
def test_reconstructions_that_cannot_be_are_one_sentence(tmp_path, settings, said):
    """A width out of range and a time without a stored average are refused, and so is a run without any."""
    with pytest.raises(ConfigError, match="has no stored averages"):
        posthoc.reconstruct(str(tmp_path), 0.1)
    made = trainer(tmp_path)
    made.config = replace(made.config, images=48)
    made.fit()
    with pytest.raises(ConfigError, match=said):
        posthoc.reconstruct(str(tmp_path), **settings)


def test_a_damaged_store_is_one_sentence(tmp_path):
    """A truncated file among the stored averages is refused with its folder."""
    made = trainer(tmp_path)
    made.config = replace(made.config, images=32)
    made.fit()
    file = sorted((tmp_path / "snapshots").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="do not fit together"):
        posthoc.reconstruct(str(tmp_path), 0.1)


PARAMETERS = {"xxs": 31.31, "xs": 124.71, "s": 280.21, "m": 497.81, "l": 777.50, "xl": 1119.28, "xxl": 1523.16}  # millions, 512x512


@pytest.mark.parametrize("path", sorted((HOUSE / "recipes").glob("edm2_img*.yaml")), ids=lambda p: p.stem)
def test_presets_are_the_published_networks(path):
    """Parameter counts on the meta device; learning rate, images, dropout and noise of the paper's table."""
    config = load_config(Edm2Config, [], str(path), "edm2")
    size, data = path.stem.split("_")[2], config.data
    with torch.device("meta"):
        unet, logvar = EDM2UNet(data.resolution, data.channels, data.classes, **vars(config.network)), LogVar()
    count = sum(p.numel() for m in (unet, logvar) for p in m.parameters()) / 1e6
    assert abs(count - PARAMETERS[size]) < 0.015
    latent = path.stem.startswith("edm2_img512")
    assert (config.P_mean, config.P_std) == ((-0.4, 1.0) if latent else (-0.8, 1.6)) and config.loop.batch == 2048
    assert config.optimizer.decay_after_images == (70000 if latent else 35000) * 2048 and config.optimizer.betas == (0.9, 0.99)
    assert config.optimizer.lr == {64: 0.017, 128: 0.012, 192: 0.01, 256: 0.009, 320: 0.008, 384: 0.007, 448: 0.0065}[config.network.model_channels]
    assert config.network.dropout == (0.1 if config.network.model_channels >= 256 else 0.0)
    text = yaml.safe_load(path.read_text())
    assert text["images"] % (1 << 20) == 0
