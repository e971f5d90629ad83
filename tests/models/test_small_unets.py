"""The networks of the three student experiments: their sizes, and the contract of a backbone."""

import pytest
import torch

from models import hub
from models.denoiser import Denoiser
from models.diffusers_unet import DiffusersUNet
from models.discriminator import DiscriminatorHead
from models.schedules import DiscreteVP
from models.small_unets import ContextUNet, SmallUNet

CIFAR10 = dict(  # the public config.json of google/ddpm-cifar10-32
    act_fn="silu", attention_head_dim=None, block_out_channels=(128, 256, 256, 256), downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), layers_per_block=2, mid_block_scale_factor=1,
    norm_eps=1e-6, norm_num_groups=32, up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))


def parameters(make, *arguments, **settings) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make(*arguments, **settings).parameters())


NETWORKS = {"context": lambda **s: ContextUNet(**{**dict(img_resolution=28, img_channels=1, label_dim=10, n_feat=16), **s}),
            "small": lambda **s: SmallUNet(**{**dict(img_resolution=32, img_channels=1, label_dim=10), **s})}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


def inputs(network, n=3):
    torch.manual_seed(1)
    size = network.config["img_resolution"]
    return torch.randn(n, network.config["img_channels"], size, size), torch.arange(n) * 100.0, {"labels": torch.arange(n)}


def test_the_three_networks_have_the_published_sizes():
    """6,585,601, 426,691 and 35,746,307 parameters."""
    assert parameters(ContextUNet, 28, 1, 10) == 6_585_601
    assert parameters(SmallUNet, 32, 3) == 426_691
    assert parameters(DiffusersUNet, 32, 3, **CIFAR10) == 35_746_307


def test_another_size_of_image():
    """SmallUNet has the same parameters at any; ContextUNet's widest convolution grows with the image: 15 x 256^2 more at 32x32."""
    assert parameters(SmallUNet, 64, 3) == 426_691
    assert parameters(ContextUNet, 32, 1, 10) == 6_585_601 + (8**2 - 7**2) * 256**2


def test_features_are_the_bottlenecks(network):
    """True gives the output unchanged with them, "only" them alone; their shape is what the discriminator is built for, 7x7 too."""
    x, c_noise, cond = inputs(network)
    output, features = network(x, c_noise, cond, features=True)
    alone = network(x, c_noise, cond, features="only")
    assert output.shape == x.shape and torch.equal(output, network(x, c_noise, cond)) and alone[0] is None and torch.equal(alone[1], features)
    assert features.shape == (3, network.feature_channels, network.feature_resolution, network.feature_resolution)
    assert DiscriminatorHead(network.feature_channels, network.feature_resolution)(features).shape == (3,)


def test_no_label_is_minus_one_or_no_condition(network):
    """Both give the same, and another output than any label."""
    x, c_noise, _ = inputs(network)
    without = network(x, c_noise)
    assert torch.equal(without, network(x, c_noise, {"labels": torch.full((3,), -1)}))
    outputs = [network(x, c_noise, {"labels": torch.full((3,), label)}) for label in range(10)]
    assert not any(torch.equal(a, b) for i, a in enumerate([without, *outputs]) for b in outputs[i:])


def test_a_network_without_classes(network):
    """It takes no condition, and nothing of it is left without gradient."""
    made = type(network)(**{**network.config, "label_dim": 0})
    x, c_noise, _ = inputs(network)
    made(x, c_noise).square().mean().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_time_matters_and_samples_do_not_mix(network):
    """In eval mode each image's output is a function of that image, its time and its label alone."""
    x, c_noise, cond = inputs(network)
    whole = network(x, c_noise, cond)
    assert torch.allclose(whole[1:2], network(x[1:2], c_noise[1:2], {"labels": cond["labels"][1:2]}), atol=1e-5)
    assert not torch.equal(network(x, c_noise + 200, cond), whole)


def test_statistics_are_kept_in_train_mode_and_used_in_eval_mode():
    """ContextUNet's buffers move in train mode alone; there its output depends on the batch, and here it does not."""
    made = NETWORKS["context"]()
    x, c_noise, cond = inputs(made)
    before = {n: b.clone() for n, b in made.named_buffers()}
    trained = made.train()(x, c_noise, cond)
    moved = {n: b.clone() for n, b in made.named_buffers()}
    tested = made.eval()(x, c_noise, cond)
    assert all(not torch.equal(moved[n], before[n]) for n in before if "running" in n)
    assert all(torch.equal(b, moved[n]) for n, b in made.named_buffers()) and not torch.allclose(trained, tested, atol=1e-2)


@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16])
def test_half_precision_weights(network, buffers):
    """A frozen teacher's weights are cast and its statistics are not; a sharded network's are cast with them. Both can be called."""
    x, c_noise, cond = inputs(network)
    exact = network(x, c_noise, cond)
    low = network.to(torch.bfloat16)
    for b in low.buffers():
        b.data = b.data.to(buffers) if b.is_floating_point() else b.data
    output = low(x, c_noise, cond)
    assert output.dtype == torch.bfloat16 and (output - exact).abs().max() < 0.1 * exact.abs().max()


def test_dropout_is_off_in_eval_mode():
    """And on in train mode."""
    made = NETWORKS["small"](dropout=0.5)
    x, c_noise, cond = inputs(made)
    assert torch.equal(made.eval()(x, c_noise, cond), made(x, c_noise, cond))
    assert not torch.equal(made.train()(x, c_noise, cond), made(x, c_noise, cond))


def test_they_come_back_from_a_folder(network, tmp_path):
    """Description, weights and statistics, by hub.save and hub.load_denoiser."""
    denoiser = Denoiser(network, DiscreteVP(torch.linspace(1e-4, 0.02, 20)), "eps")
    hub.save(tmp_path, {**hub.describe(denoiser), "sampler": {"type": "ddim", "steps": 5}}, denoiser.state_dict())
    x, _, cond = inputs(network)
    t = torch.tensor([1.0, 10.0, 20.0])
    assert torch.equal(hub.load_denoiser(str(tmp_path))(x, t, cond), denoiser(x, t, cond))


@pytest.mark.parametrize("kind, settings", [
    (ContextUNet, dict(img_resolution=30)), (ContextUNet, dict(img_resolution=28, n_feat=12)),
    (SmallUNet, dict(img_resolution=30)), (SmallUNet, dict(img_resolution=32, model_channels=20))])
def test_sizes_that_cannot_be_are_one_sentence(kind, settings):
    """The resolution and the widths have to divide."""
    with pytest.raises(ValueError, match="divisible by"):
        kind(img_channels=1, **settings)
