"""Looking at a run while it trains."""

from dataclasses import replace

import pytest
import torch

from conftest import save_autoencoder, tiny_denoiser
from models import hub
from models.hub import ModelError
from test_edm2 import trainer
from trainers.config import ConfigError, EvalConfig
from trainers.evaluation import Evaluation

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
EVAL = EvalConfig(samples=80, batch=40, split="train")


def looked_at(out, every: int, **settings):
    """A run of 48 images that is looked at now and then."""
    made = trainer(out)
    loop = replace(made.config.loop, eval_every=every, snapshot_every=0)
    made.config = replace(made.config, images=48, loop=loop, eval=replace(EVAL, **settings))
    return made


def test_looking_changes_nothing(tmp_path):
    """The same weights, to the bit, with an evaluation at every step and without; pictures and distances are written."""
    ends = []
    for every in (0, 16):
        made = looked_at(tmp_path / str(every), every)
        made.fit()
        ends.append(made.network.gather(made.network.master_shards()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))
    assert not (tmp_path / "0/samples").exists()
    assert [p.name for p in sorted((tmp_path / "16/samples").iterdir())] == [f"{n:012d}.png" for n in (16, 32, 48)]
    assert (tmp_path / "16/metrics.jsonl").read_text().count('"fd"') == 3


def test_a_folded_network_is_the_same_network():
    """Weights normalised once give what weights normalised in each pass give, in float32 to rounding; twice is once."""
    from models.edm2_unet import fold_weights

    x, t, cond = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1, {"labels": torch.tensor([1, 2, -1, 0])}
    plain, folded = tiny_denoiser().eval(), fold_weights(fold_weights(tiny_denoiser().eval()))
    assert not torch.equal(plain.backbone.out_conv.weight, folded.backbone.out_conv.weight)
    with torch.no_grad():
        assert torch.allclose(plain(x, t, cond), folded(x, t, cond), atol=1e-6)


def latent_evaluation(tmp_path, autoencoder):
    """An evaluation of 4-channel latents of 8x8, and a network that makes them."""
    made = trainer(tmp_path)
    config = replace(made.config, data=replace(made.config.data, channels=4), eval=replace(EVAL, autoencoder=autoencoder), out=str(tmp_path))
    made.images.first = lambda count: (torch.randn(100, 4, 8, 8), None)
    torch.manual_seed(0)
    unet = type(tiny_denoiser().backbone)(8, 4, 10, model_channels=16, channel_mult=(1, 2), num_blocks=1)
    denoiser = tiny_denoiser()
    denoiser.backbone = unet.eval()
    return Evaluation(config, made.cluster, made.images), denoiser, {**hub.describe(denoiser), "sampler": {"type": "heun", "steps": 2}}


def test_latents_are_decoded_for_their_picture(tmp_path):
    """With an autoencoder, the picture is of decoded images, eight times as large; without, none is written, and the distance is given all the same."""
    import matplotlib.image

    evaluation, denoiser, about = latent_evaluation(tmp_path / "with", save_autoencoder(tmp_path / "vae"))
    distance = evaluation(denoiser, about, 16)
    picture = matplotlib.image.imread(tmp_path / "with/samples/000000000016.png")
    assert distance > 0 and picture.shape[0] == 8 * (64 + 1)
    evaluation, denoiser, about = latent_evaluation(tmp_path / "without", None)
    assert evaluation(denoiser, about, 16) > 0 and not (tmp_path / "without/samples").exists()


def test_what_is_wrong_with_it_is_said_before_training(tmp_path):
    """A split that is not there, and an autoencoder that is not there, are refused when the evaluation is made."""
    with pytest.raises(ConfigError, match="data.split is elsewhere"):
        looked_at(tmp_path, 16, split="elsewhere").fit()
    with pytest.raises(ModelError, match="no such folder"):
        latent_evaluation(tmp_path / "x", "./nowhere")
