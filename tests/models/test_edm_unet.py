"""EDM's networks: their published sizes, the formulas of their parts worked out by hand, and the public names of their parameters."""

import ast
import math
from math import sqrt
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models import edm_unet, export, hub
from models.denoiser import Denoiser
from models.edm2_unet import resample
from models.edm_unet import NETWORKS, EDMBlock, Conv, DhariwalUNet, SongUNet, from_edm
from models.schedules import EDM

DDPMPP = dict(model_type="SongUNet", img_channels=3, augment_dim=9, model_channels=128, channel_mult=[2, 2, 2], dropout=0.13,
              embedding_type="positional", encoder_type="standard", decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1])
NCSNPP = DDPMPP | dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
ADM = dict(model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000, model_channels=192, channel_mult=[1, 2, 3, 4])
PUBLISHED = {  # arguments, and the parameters of a network that the original code makes of them
    "cifar10-cond-ddpmpp": (DDPMPP | dict(img_resolution=32, label_dim=10), 55_735_299),
    "cifar10-uncond-ddpmpp": (DDPMPP | dict(img_resolution=32), 55_733_891),
    "cifar10-cond-ncsnpp": (NCSNPP | dict(img_resolution=32, label_dim=10), 56_400_643),
    "ffhq-ddpmpp": (DDPMPP | dict(img_resolution=64, channel_mult=[1, 2, 2, 2]), 61_805_571),
    "ffhq-ncsnpp": (NCSNPP | dict(img_resolution=64, channel_mult=[1, 2, 2, 2]), 62_761_091),
    "imagenet64-adm": (ADM, 295_899_267),
}
TINY = dict(img_resolution=8, img_channels=2, label_dim=3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
KINDS = {
    "ddpmpp": dict(type="SongUNet", augment_dim=4),
    "ncsnpp": dict(type="SongUNet", embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1]),
    "skip": dict(type="SongUNet", encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1]),
    "adm": dict(type="DhariwalUNet", model_channels=32, channel_mult=[2, 4], augment_dim=4),
}


def tiny(kind, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    arguments = TINY | KINDS[kind] | settings
    return NETWORKS[arguments.pop("type")](**arguments).to(dtype).eval()


def inputs(batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x.to(dtype), torch.linspace(-1.5, 1.0, batch, dtype=dtype), {"labels": torch.arange(batch) % 4 - 1}


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# --- the published networks

def published(name):
    """A published network on the meta device, and its tensors' shapes."""
    arguments, count = PUBLISHED[name]
    with torch.device("meta"):
        net = NETWORKS[arguments["model_type"]](**{k: v for k, v in arguments.items() if k != "model_type"})
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}, count


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    """The published networks have as many parameters as the original code makes, those of unused layers among them."""
    shapes, count = published(name)
    assert sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(("resample_filter", "freqs"))) == count


BLOCK, HEADS, SKIP = ([f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")] for layers in (
    ("norm0", "conv0", "affine", "norm1", "conv1"), ("norm2", "qkv", "proj"), ("skip",)))
FILTERS = ("conv0.resample_filter", "skip.resample_filter")


def parts(shapes, name):
    return {key.removeprefix(f"{name}.") for key in shapes if key.startswith(f"{name}.")}


def test_names_of_ddpmpp():
    """CIFAR-10's DDPM++: the first layer has the plain width, and attention is in the encoder's blocks and the decoder's last at 16x16."""
    shapes, _ = published("cifar10-cond-ddpmpp")
    assert shapes["enc.32x32_conv.weight"] == (128, 3, 3, 3) and shapes["enc.32x32_block0.conv0.weight"] == (256, 128, 3, 3)
    assert shapes["map_label.weight"] == (128, 10) and shapes["map_label.bias"] == (128,) and shapes["map_augment.weight"] == (128, 9)
    assert shapes["map_layer0.weight"] == (512, 128) and "map_noise.freqs" not in shapes
    attending = {key.removesuffix(".qkv.weight") for key in shapes if key.endswith("qkv.weight")}
    assert attending == {*(f"enc.16x16_block{i}" for i in range(4)), "dec.8x8_in0", "dec.16x16_block4"}
    assert parts(shapes, "enc.16x16_down") == {*BLOCK, *SKIP, *FILTERS} and shapes["enc.16x16_down.skip.resample_filter"] == (1, 1, 2, 2)
    assert parts(shapes, "enc.16x16_block0") == {*BLOCK, *HEADS} and parts(shapes, "dec.16x16_block4") == {*BLOCK, *SKIP, *HEADS}
    assert shapes["dec.32x32_block4.conv0.weight"] == (256, 384, 3, 3)
    assert shapes["dec.32x32_aux_norm.weight"] == (256,) and shapes["dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)
    assert [key for key in shapes if "aux" in key and "32x32" not in key] == []


def test_names_of_ncsnpp():
    """FFHQ's NCSN++: the image comes in again at every resolution, each convolution from the one before."""
    shapes, _ = published("ffhq-ncsnpp")
    aux = {key: shape for key, shape in shapes.items() if "aux_residual.weight" in key}
    assert aux == {"enc.32x32_aux_residual.weight": (128, 3, 3, 3), "enc.16x16_aux_residual.weight": (256, 128, 3, 3),
                   "enc.8x8_aux_residual.weight": (256, 256, 3, 3)}
    assert shapes["enc.8x8_aux_residual.resample_filter"] == (1, 1, 4, 4) and shapes["map_noise.freqs"] == (128,)
    assert shapes["map_augment.weight"] == (256, 9) and "map_label.weight" not in shapes


def test_names_of_adm():
    """ImageNet-64's ADM: shortcuts that only resample have no weight, and attention is in every block from 32x32 on."""
    shapes, _ = published("imagenet64-adm")
    assert parts(shapes, "enc.32x32_down") == parts(shapes, "dec.64x64_up") == {*BLOCK, *FILTERS}
    attending = {key.removesuffix(".qkv.weight") for key in shapes if key.endswith("qkv.weight")}
    assert attending == {*(f"enc.{r}x{r}_block{i}" for r in (32, 16, 8) for i in range(3)),
                         *(f"dec.{r}x{r}_block{i}" for r in (32, 16, 8) for i in range(4)), "dec.8x8_in0"}
    assert shapes["map_label.weight"] == (768, 1000) and "map_label.bias" not in shapes
    assert shapes["enc.64x64_block0.affine.weight"] == (384, 768)
    assert shapes["out_norm.weight"] == (192,) and shapes["out_conv.weight"] == (3, 192, 3, 3)


def test_first_layer():
    """ADM's first layer has the width of its level, SongUNet's the plain one."""
    widths = [tiny(kind, channel_mult=[2, 4]).enc["8x8_conv"].weight.shape[0] for kind in ("adm", "ddpmpp")]
    assert widths == [64, 8]


# --- their parts

@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("mode", ["down", "up"])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_resampling_comes_first(mode, kernel, taps):
    """A resampling convolution is the filter and then the convolution; kernel 0 is the filter."""
    conv = Conv(3, 3, kernel, mode, taps).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = resample(x, mode, taps)
    assert_close(conv(x), F.conv2d(y, conv.weight, conv.bias, padding=kernel // 2) if kernel else y, rtol=1e-6, atol=1e-7)
    assert conv.resample_filter.sum() == 1


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_fused_resampling(taps):
    """Fused, the image lies in an endless plane of zeros: convolved and filtered there, it gives the inner part."""
    conv = Conv(2, 5, 3, "down", taps, fused=True).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    wide = F.conv2d(F.pad(x, (4,) * 4), conv.weight, padding=1)
    assert_close(conv(x), resample(wide, "down", taps)[:, :, 2:-2, 2:-2] + conv.bias[:, None, None], rtol=1e-6, atol=1e-7)


def hand_norm(layer, x):
    """Group normalisation with the published number of groups."""
    B, C, H, W = x.shape
    groups = x.reshape(B, min(32, C // 4), -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    return groups.reshape(x.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


def hand_attention(block, x, heads):
    """One query at a time: channel (head * c + channel) * 3 + {0, 1, 2} holds q, k and v."""
    B, C, H, W = x.shape
    c = C // heads
    normed = hand_norm(block.norm2, x).reshape(B, C, -1)
    qkv = torch.einsum("oi,bip->bop", block.qkv.weight[:, :, 0, 0], normed) + block.qkv.bias[:, None]
    out = torch.zeros(B, C, H * W, dtype=x.dtype)
    for b in range(B):
        for head in range(heads):
            q, k, v = (torch.stack([qkv[b, (head * c + i) * 3 + part] for i in range(c)]) for part in range(3))
            for query in range(H * W):
                weights = (q[:, query] @ k / sqrt(c)).exp()
                out[b, head * c:(head + 1) * c, query] = v @ (weights / weights.sum())
    return (torch.einsum("oi,bip->bop", block.proj.weight[:, :, 0, 0], out) + block.proj.bias[:, None]).reshape(x.shape)


SONG = dict(adaptive=False, project=True, skip_scale=sqrt(0.5), eps=1e-6, taps=(1, 1), dropout=0.0)
DHARIWAL = SONG | dict(adaptive=True, project=False, skip_scale=1.0, eps=1e-5)


def shaken(module):
    """Normalisation starts with weight 1 and bias 0, which hides them."""
    for p in module.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return module


@pytest.mark.parametrize("settings", [SONG, DHARIWAL], ids=["song", "dhariwal"])
@pytest.mark.parametrize("mode, channels", [("keep", 8), ("keep", 12), ("down", 8), ("up", 8), ("up", 12)])
def test_block_formula(settings, mode, channels):
    """A block is its formula worked out by hand: attention by sums over keys, modulation by a shift alone or by a scale and a shift."""
    torch.manual_seed(0)
    block = shaken(EDMBlock(channels, 8, 5, mode, True, heads=2, **settings).double())
    x, emb = torch.randn(2, channels, 4, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = block(x, emb)

    def resampled(x):
        return x if mode == "keep" else F.avg_pool2d(x, 2) if mode == "down" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    modulation = (emb @ block.affine.weight.t() + block.affine.bias)[:, :, None, None]
    y = F.conv2d(resampled(F.silu(hand_norm(block.norm0, x))), block.conv0.weight, block.conv0.bias, padding=1)
    if settings["adaptive"]:
        y = F.silu(hand_norm(block.norm1, y) * (1 + modulation[:, :8]) + modulation[:, 8:])
    else:
        y = F.silu(hand_norm(block.norm1, y + modulation))
    y = F.conv2d(y, block.conv1.weight, block.conv1.bias, padding=1)
    convolved = channels != 8 or settings["project"] and mode != "keep"
    x = F.conv2d(resampled(x), block.skip.weight, block.skip.bias) if convolved else resampled(x)
    x = (x + y) * settings["skip_scale"]
    x = (x + hand_attention(block, x, heads=2)) * settings["skip_scale"]
    assert_close(found, x, rtol=1e-9, atol=1e-11)
    assert (block.skip is None) == (mode == "keep" and channels == 8)


@pytest.mark.parametrize("width, heads", [(64, 1), (192, 3), (160, 2), (48, 0)])
def test_heads_by_width(width, heads):
    """Where their number is not given, a block has a head to every 64 channels, and no attention below that."""
    block = EDMBlock(width, width, 4, attention=True, heads=None, **DHARIWAL)
    assert block.heads == heads and any("qkv" in name for name, _ in block.named_parameters()) == (heads > 0)
    assert EDMBlock(width, width, 4, attention=True, heads=1, **SONG).heads == 1


def test_positional_embedding():
    """SongUNet's frequencies fall from 1 to 1/10000, sines first; ADM's end one step before, cosines first."""
    c_noise = torch.tensor([-1.5, 0.3], dtype=torch.float64)
    net = tiny("ddpmpp", label_dim=0)
    net.map_layer0.weight.data, net.map_layer1.weight.data = torch.eye(32, 8).double(), torch.eye(32).double()
    net.map_layer0.bias.data.zero_(), net.map_layer1.bias.data.zero_()
    angles = c_noise[:, None] * torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4]).double()
    expected = F.silu(F.silu(torch.cat([angles.sin(), angles.cos()], dim=1)))
    assert_close(net.embedding(c_noise, None)[:, :8], expected, rtol=1e-6, atol=1e-8)

    net = tiny("adm", model_channels=8, label_dim=0)
    net.map_layer0.weight.data, net.map_layer1.weight.data = torch.eye(32, 8).double(), torch.eye(32).double()
    net.map_layer0.bias.data.zero_(), net.map_layer1.bias.data.zero_()
    angles = c_noise[:, None] * torch.tensor([1, 0.1, 0.01, 0.001]).double()
    expected = F.silu(F.silu(torch.cat([angles.cos(), angles.sin()], dim=1)))
    assert_close(net.embedding(c_noise, None)[:, :8], expected, rtol=1e-6, atol=1e-8)


def test_label_embedding():
    """SongUNet adds sqrt(classes) times the label's column, and a bias, before its layers; ADM adds the plain column behind them."""
    _, c_noise, cond = inputs()
    net = shaken(tiny("ncsnpp"))
    onehot = torch.eye(3, dtype=torch.float64)[[0, 0, 1]] * torch.tensor([[0], [1], [1]])
    angles = 2 * math.pi * c_noise[:, None] * net.map_noise.freqs
    emb = torch.cat([angles.sin(), angles.cos()], dim=1) + sqrt(3) * onehot @ net.map_label.weight.t() + net.map_label.bias
    for layer in (net.map_layer0, net.map_layer1):
        emb = F.silu(emb @ layer.weight.t() + layer.bias)
    assert_close(net.embedding(c_noise, cond), emb, rtol=1e-9, atol=1e-11)

    net = shaken(tiny("adm"))
    plain = tiny("adm", label_dim=0)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "label" not in k})
    plain.map_layer1.bias.data += net.map_label.weight[:, 1]
    assert_close(net.embedding(c_noise, cond)[2], plain.embedding(c_noise, None)[2], rtol=1e-9, atol=1e-11)


def test_wiring_of_residual_input():
    """NCSN++: what was convolved from the image is averaged into the encoder, is a skip, and is convolved on at the next resolution."""
    net, (x, c_noise, cond) = tiny("ncsnpp", channel_mult=[1, 2, 2], attn_resolutions=[]), inputs()
    emb, e, d = net.embedding(c_noise, cond), net.enc, net.dec
    s0 = e["8x8_conv"](x)
    s1 = e["8x8_block0"](s0, emb)
    s2 = (e["4x4_down"](s1, emb) + e["4x4_aux_residual"](x)) / sqrt(2)
    s3 = e["4x4_block0"](s2, emb)
    s4 = (e["2x2_down"](s3, emb) + e["2x2_aux_residual"](s2)) / sqrt(2)
    s5 = e["2x2_block0"](s4, emb)
    y = d["2x2_in1"](d["2x2_in0"](s5, emb), emb)
    y = d["2x2_block1"](torch.cat([d["2x2_block0"](torch.cat([y, s5], 1), emb), s4], 1), emb)
    y = d["4x4_block1"](torch.cat([d["4x4_block0"](torch.cat([d["4x4_up"](y, emb), s3], 1), emb), s2], 1), emb)
    y = d["8x8_block1"](torch.cat([d["8x8_block0"](torch.cat([d["8x8_up"](y, emb), s1], 1), emb), s0], 1), emb)
    assert_close(net(x, c_noise, cond), d["8x8_aux_conv"](F.silu(d["8x8_aux_norm"](y))), rtol=1e-9, atol=1e-11)


def test_wiring_of_skip_input_and_output():
    """The halved image is added at every resolution, and the outputs of all resolutions are doubled and summed."""
    net, (x, c_noise, cond) = tiny("skip"), inputs()
    emb, e, d = net.embedding(c_noise, cond), net.enc, net.dec
    s0 = e["8x8_conv"](x)
    s1 = e["8x8_block0"](s0, emb)
    s2 = e["4x4_down"](s1, emb) + e["4x4_aux_skip"](resample(x, "down", (1, 3, 3, 1)))
    s3 = e["4x4_block0"](s2, emb)
    y = d["4x4_in1"](d["4x4_in0"](s3, emb), emb)
    y = d["4x4_block1"](torch.cat([d["4x4_block0"](torch.cat([y, s3], 1), emb), s2], 1), emb)
    low = d["4x4_aux_conv"](F.silu(d["4x4_aux_norm"](y)))
    y = d["8x8_block1"](torch.cat([d["8x8_block0"](torch.cat([d["8x8_up"](y, emb), s1], 1), emb), s0], 1), emb)
    high = d["8x8_aux_conv"](F.silu(d["8x8_aux_norm"](y)))
    assert_close(net(x, c_noise, cond), high + resample(low, "up", (1, 3, 3, 1)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("setting", [dict(encoder_type="residue"), dict(decoder_type="residual"), dict(embedding_type="rotary")], ids=str)
def test_unknown_kinds(setting):
    """A kind of embedding, encoder or decoder that is not known is refused by its name."""
    with pytest.raises(ValueError, match=next(iter(setting))):
        tiny("ddpmpp", **setting)


# --- the contract of a backbone

def test_no_label_is_no_condition(kind):
    """Label -1 is the same as no condition at all, bit for bit, and every other label is not."""
    net, (x, c_noise, _) = tiny(kind), inputs()
    nothing = net(x, c_noise, None)
    assert torch.equal(net(x, c_noise, {"labels": torch.tensor([-1, -1, -1])}), nothing)
    mixed = net(x, c_noise, {"labels": torch.tensor([-1, 0, 2])})
    assert torch.equal(mixed[0], nothing[0]) and all((mixed[i] - nothing[i]).abs().max() > 1e-5 for i in (1, 2))


def test_samples_are_independent(kind):
    """A sample's output depends on its own image, noise level and label alone."""
    net, (x, c_noise, cond) = tiny(kind), inputs()
    before = net(x, c_noise, cond)
    x[1:] = torch.randn_like(x[1:])
    after = net(x, torch.tensor([c_noise[0], 0.3, 0.4]), {"labels": torch.tensor([cond["labels"][0], 2, 2])})
    assert_close(before[0], after[0], rtol=1e-12, atol=1e-13)
    assert (before[1:] - after[1:]).abs().amax((1, 2, 3)).min() > 1e-3


def test_every_parameter_counts(kind):
    """Every parameter reaches the output, so none is waited for in vain; augmentation's weight is kept, and is none."""
    net = tiny(kind)
    net(*inputs(4)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    assert ("map_augment.weight" in net.state_dict()) == ("augment_dim" in KINDS[kind])


def test_features_are_the_last_encoder_output(kind):
    """The features are what the last encoder block puts out, of the stated size, with or without the rest of the pass."""
    net, x = tiny(kind), inputs()
    seen = []
    list(net.enc.values())[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    output, features = net(*x, features=True)
    nothing, alone = net(*x, features="only")
    assert torch.equal(features, seen[0]) and torch.equal(alone, features) and nothing is None
    assert torch.equal(output, net(*x))
    assert features.shape == (3, net.feature_channels, net.feature_resolution, net.feature_resolution)


def test_half_precision_weights(kind):
    """In bfloat16 the network stays within a few percent of itself in float64."""
    expected, found = tiny(kind)(*inputs()), tiny(kind, torch.bfloat16)(*inputs())
    assert found.dtype == torch.bfloat16
    assert rms(found.double() - expected) < 0.05 * rms(expected)


def test_autocast(kind):
    """Under autocast, with float32 weights, it is as close."""
    expected = tiny(kind)(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny(kind, torch.float32)(*inputs())
    assert rms(found.double() - expected) < 0.05 * rms(expected)


def test_dropout_only_in_training(kind):
    """Dropout changes the output in training mode alone."""
    net, x = tiny(kind, dropout=0.5), inputs()
    assert not torch.equal(net.train()(*x), net.train()(*x))
    assert torch.equal(net.eval()(*x), tiny(kind, dropout=0.0)(*x))


def test_config_makes_the_same_network(kind):
    """A network built from another's configuration takes its weights and gives its output bit for bit."""
    net, x = tiny(kind), inputs()
    again = type(net)(**net.config).double().eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(*x), net(*x))


# --- from the public names

def snapshot(kind):
    """A denoiser, and its tensors under the public names."""
    net = tiny(kind, torch.float32)
    config = {"model_type": type(net).__name__, **net.config, "use_fp16": True, "sigma_min": 0.0, "sigma_max": math.inf,
              "sigma_data": 0.6, "label_dropout": 0.1}
    return Denoiser(net, EDM(sigma_data=0.6), "edm").eval(), {f"model.{k}": v for k, v in net.state_dict().items()}, config


def test_public_snapshot_round_trip(kind):
    """A network read from a snapshot under its public names, frozen, gives its origin's output bit for bit, in float32."""
    denoiser, tensors, config = snapshot(kind)
    found = from_edm(config, tensors)
    x, _, cond = inputs(dtype=torch.float32)
    t = torch.tensor([0.01, 0.6, 40.0])
    assert torch.equal(found(x, t, cond), denoiser(x, t, cond)) and found(x, t, cond).dtype == torch.float32
    assert found.schedule.sigma_data == 0.6 and not found.training and not any(p.requires_grad for p in found.parameters())
    assert found.state_dict().keys() == denoiser.state_dict().keys()


def test_preconditioning():
    """D = c_skip x + c_out F(c_in x, ln(sigma) / 4), equation 7 of the paper."""
    denoiser, tensors, config = snapshot("ddpmpp")
    x, _, cond = inputs(dtype=torch.float32)
    sigma = torch.tensor([0.01, 0.6, 40.0])
    s = sigma[:, None, None, None]
    F_x = denoiser.backbone(x / (s**2 + 0.36).sqrt(), sigma.log() / 4, cond)
    expected = 0.36 / (s**2 + 0.36) * x + 0.6 * s / (s**2 + 0.36).sqrt() * F_x
    assert_close(from_edm(config, tensors)(x, sigma, cond), expected, rtol=1e-5, atol=1e-6)


def test_adm_is_the_default():
    """A snapshot that does not name its network has ADM's."""
    _, tensors, config = snapshot("adm")
    del config["model_type"]
    assert isinstance(from_edm(config, tensors).backbone, DhariwalUNet)
    with pytest.raises(ValueError, match="'UNet'"):
        from_edm(config | {"model_type": "UNet"}, tensors)


def test_saved_folder(kind, tmp_path):
    """As a model's folder, it is the same again."""
    denoiser, tensors, config = snapshot(kind)
    hub.save(tmp_path, {**hub.describe(denoiser), "sampler": {"type": "heun", "steps": 18}}, denoiser.state_dict())
    found = hub.load_denoiser(str(tmp_path))
    x, _, cond = inputs(dtype=torch.float32)
    assert torch.equal(found(x, torch.tensor(2.0), cond), denoiser(x, torch.tensor(2.0), cond))
    assert type(found.backbone) is (DhariwalUNet if kind == "adm" else SongUNet)


@pytest.mark.parametrize("damage", [
    lambda tensors: tensors.pop("model.map_layer0.bias"),
    lambda tensors: tensors.pop("model.enc.4x4_down.conv0.resample_filter"),
    lambda tensors: tensors.update({"model.extra.weight": torch.ones(2, 2)}),
    lambda tensors: tensors.update({"map_layer0.bias": tensors.pop("model.map_layer0.bias")}),
    lambda tensors: tensors.update({"backbone.map_layer0.bias": tensors.pop("model.map_layer0.bias")}),
    lambda tensors: tensors.update({"model.map_label.weight": tensors["model.map_label.weight"][:1]}),
], ids=["missing", "no-filter", "extra", "no-prefix", "own-prefix", "too-small"])
def test_snapshot_that_does_not_fit(kind, damage):
    """A snapshot with a tensor missing, left over, renamed or of another shape is refused."""
    _, tensors, config = snapshot(kind)
    damage(tensors)
    with pytest.raises(ValueError, match="not of an EDM network"):
        from_edm(config, tensors)


def test_names_are_its_own():
    """An exported pipeline puts the files of all networks into one, so no top-level name here is another's."""
    folder = Path(edm_unet.__file__).parent
    bound = {name: {n for node, _ in export._statements(folder / f"{name}.py") if not isinstance(node, (ast.Import, ast.ImportFrom))
                    for n in export._bound(node)} for name in export.SOURCES}
    own = bound.pop("edm_unet")
    assert "SongUNet" in own and {name: own & others for name, others in bound.items() if own & others} == {}
