"""The EDM2 network: magnitudes, normalisation, the formulas of its parts, and the public names of its parameters."""

import math
from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from models.denoiser import Denoiser
from models.edm2_unet import Block, EDM2UNet, LogVar, MPConv, MPFourier, from_nvlabs, mp_cat, mp_silu, mp_sum
from models.edm2_unet import normalize, resample, unit_norm_weights
from models.schedules import EDM

TINY = dict(img_resolution=8, img_channels=2, label_dim=3, model_channels=8, channel_mult=[1, 2], num_blocks=1,
            attn_resolutions=[4], channels_per_head=8)
SIZES = {"XXS": (64, 31.31), "XS": (128, 124.71), "S": (192, 280.21), "M": (256, 497.81)}


def awake(module):
    """The gains are 0 at initialization, which hides what they multiply."""
    for name, p in module.named_parameters():
        if name.endswith("gain"):
            p.data.fill_(0.75)
    return module


def tiny(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return awake(EDM2UNet(**(TINY | settings))).to(dtype)


def inputs(batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x.to(dtype), torch.linspace(-1.5, 1.0, batch, dtype=dtype), {"labels": torch.arange(batch) % 4 - 1}


def rms(x, *dims):
    return x.square().mean(dims).sqrt() if dims else x.square().mean().sqrt().item()


@pytest.mark.parametrize("channels, millions", SIZES.values(), ids=SIZES)
def test_parameter_counts(channels, millions):
    """The published networks for 512x512 latents have the published numbers of parameters."""
    with torch.device("meta"):
        model = nn.ModuleList([EDM2UNet(64, 4, 1000, model_channels=channels), LogVar()])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_parameter_count_without_classes():
    """The unconditional XS network has the published 124.20M parameters."""
    with torch.device("meta"):
        assert round(sum(p.numel() for p in EDM2UNet(64, 4, model_channels=128).parameters()) / 1e6, 2) == 124.20


@pytest.mark.parametrize("dims", [None, (1,), (2, 3)])
def test_normalize(dims):
    """normalize divides by 1e-4 plus the RMS over its dimensions, even where all is zero."""
    x = 3 * torch.randn(4, 5, 2, 3, dtype=torch.float64)
    x[0] = 0
    expected = x / (1e-4 + x.square().mean(dims or (1, 2, 3), keepdim=True).sqrt())
    assert_close(normalize(x, dims), expected, rtol=1e-12, atol=0)
    assert normalize(x.bfloat16(), dims).dtype == torch.bfloat16


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sum_and_concatenation_keep_unit_magnitude(t):
    """mp_sum and mp_cat of unrelated unit-magnitude inputs have unit magnitude; in mp_cat each side's power is its share."""
    a, b = torch.randn(4, 40, 50, 50, dtype=torch.float64), torch.randn(4, 10, 50, 50, dtype=torch.float64)
    assert rms(mp_sum(a, a.flip(0), t)) == pytest.approx(1, abs=0.02)
    joined = mp_cat(a, b, t)
    assert rms(joined) == pytest.approx(1, abs=0.02)
    power = joined[:, :40].square().sum() / joined.square().sum()
    assert power.item() == pytest.approx((1 - t) ** 2 / ((1 - t) ** 2 + t**2), abs=0.01)
    assert F.cosine_similarity(joined[:, 40:].flatten(), b.flatten(), dim=0).item() == pytest.approx(float(t > 0), abs=1e-9)


def test_sum_formula():
    """mp_sum is ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)."""
    a, b = torch.randn(2, 10, dtype=torch.float64)
    assert_close(mp_sum(a, b, 0.3), (0.7 * a + 0.3 * b) / sqrt(0.58), rtol=1e-12, atol=1e-15)


def test_silu_keeps_unit_magnitude():
    """mp_silu of a unit Gaussian has unit magnitude, by quadrature, to the three digits of its constant."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / sqrt(2 * math.pi)
    assert torch.trapezoid(mp_silu(x).square() * density, x).sqrt().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bandwidth", [1.0, 4.0])
def test_fourier_features_have_unit_magnitude(bandwidth):
    """Fourier features have unit magnitude at any input, and are sqrt(2) cos(x f + phase)."""
    torch.manual_seed(0)
    fourier = MPFourier(20_000, bandwidth)
    x = torch.tensor([-1.5, 0.0, 1.0], dtype=torch.float64)
    y = fourier(x)
    assert (rms(y, 1) - 1).abs().max() < 0.02 and y.mean(1).abs().max() < 0.05
    assert fourier.freqs.std().item() == pytest.approx(2 * math.pi * bandwidth, rel=0.03)
    assert_close(y[1], sqrt(2) * fourier.phases.cos().double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_layer_keeps_unit_magnitude(kernel):
    """A layer with weights of any scale maps unit Gaussian input to unit magnitude, per output channel."""
    torch.manual_seed(0)
    layer = MPConv(64, 32, kernel).double()
    layer.weight.data *= torch.logspace(-1, 2, 32, dtype=torch.float64).reshape(-1, 1, *[1] * len(kernel))
    x = torch.randn(8, 64, 40, 40, dtype=torch.float64) if kernel else torch.randn(8000, 64, dtype=torch.float64)
    y = layer(x)[..., 1:-1, 1:-1] if kernel else layer(x)
    magnitudes = rms(y, 0, 2, 3) if kernel else rms(y, 0)
    assert (magnitudes - 1).abs().max() < 0.06 and magnitudes.mean().item() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize("attention", [False, True])
def test_blocks_keep_unit_magnitude(attention):
    """At initialization no block lets the magnitude of its activations drift, but for the averaging of attention."""
    torch.manual_seed(0)
    net = EDM2UNet(16, 3, 10, model_channels=64, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(16, 8) if attention else (),
                   channels_per_head=64 if attention else 1000)
    found = {}
    for name, module in [*net.enc.items(), *net.dec.items()]:
        module.register_forward_hook(lambda module, args, out, name=name: found.update({name: rms(out)}))
    with torch.no_grad():
        net(torch.randn(8, 3, 16, 16), torch.linspace(-1.5, 1, 8), {"labels": torch.arange(8)})
    assert found.keys() == {*net.enc, *net.dec}
    assert all((0.75 if attention else 0.9) < magnitude < 1.1 for magnitude in found.values()), found


def test_untrained_output_is_zero():
    """The output gain starts at 0, so an untrained network outputs exactly 0."""
    net = EDM2UNet(**TINY)
    assert net(*inputs(dtype=torch.float32)).abs().max() == 0


def test_output_ignores_the_scale_of_weights():
    """Scaling any row of any weight leaves the output alone, but for the 1e-4 that is added to its magnitude."""
    net, x = tiny(), inputs()
    for name in unit_norm_weights(net):
        net.get_parameter(name).data *= 1e4
    before = net(*x)
    for name in unit_norm_weights(net):
        weight = net.get_parameter(name).data
        weight *= torch.logspace(-1, 2, len(weight), dtype=weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    assert_close(net(*x), before, rtol=1e-5, atol=1e-6)
    standard = tiny()
    expected = standard(*x)
    for name in unit_norm_weights(standard):
        standard.get_parameter(name).data *= 10
    assert_close(standard(*x), expected, rtol=0, atol=3e-3)


def test_gradient_is_orthogonal_to_weights():
    """The gradient of every normalised weight is orthogonal to it, row by row, up to the 1e-4 that is added to its magnitude."""
    net = tiny()
    net(*inputs()).square().sum().backward()
    for name in unit_norm_weights(net):
        weight = net.get_parameter(name)
        rows, gradients = weight.detach().flatten(1), weight.grad.flatten(1)
        cosine = (rows * gradients).sum(1).abs() / (rows.norm(dim=1) * gradients.norm(dim=1))
        assert gradients.abs().max() > 0 and cosine.max() < 1e-3, name


def test_unit_norm_weights():
    """The weights to keep at unit norm are those of the MPConv layers: every parameter but the gains, and no other layer's."""
    model = nn.ModuleDict({"net": tiny(), "logvar": LogVar(), "other": nn.Conv2d(2, 2, 1)})
    expected = {name for name, p in model.named_parameters() if not name.endswith("gain") and not name.startswith("other")}
    names = unit_norm_weights(model)
    assert len(names) == len(set(names)) and set(names) == expected
    assert unit_norm_weights(nn.Conv2d(2, 2, 1)) == []


def filtered(x, mode, taps):
    """Depthwise resampling from its definition: a sum over taps of shifted images, by rows and then by columns."""
    taps = np.array(taps) / np.sum(taps) * (1 if mode == "down" else 2)
    for axis in (2, 3):
        x = np.moveaxis(x, axis, -1)
        pad = len(taps) // 2 - 1
        size = x.shape[-1] // 2 if mode == "down" else x.shape[-1] * 2
        y = np.zeros((*x.shape[:-1], size))
        for near in range(x.shape[-1]):
            for tap, weight in enumerate(taps):
                far = near * 2 + tap - pad if mode == "up" else near - tap + pad
                if mode == "up" and 0 <= far < size:
                    y[..., far] += weight * x[..., near]
                if mode == "down" and far % 2 == 0 and 0 <= far // 2 < size:
                    y[..., far // 2] += weight * x[..., near]
        x = np.moveaxis(y, -1, axis)
    return x


@pytest.mark.parametrize("taps", [(1, 1), (0, 1, 1, 0), (1, 3, 3, 1), (1, 2)])
@pytest.mark.parametrize("mode", ["down", "up"])
def test_resampling(mode, taps):
    """Resampling is the separable filter of its definition, at unit gain when halving and two per axis when doubling."""
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert_close(resample(x, mode, taps), torch.tensor(filtered(x.numpy(), mode, taps)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["down", "up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_resampling_is_the_generic_one(mode, dtype):
    """Pooling and repetition equal the depthwise convolution with [1, 1] bit for bit."""
    x = torch.randn(2, 3, 8, 8).to(dtype)
    f = torch.full((3, 1, 2, 2), 0.25 if mode == "down" else 1.0, dtype=dtype)
    generic = F.conv2d(x, f, stride=2, groups=3) if mode == "down" else F.conv_transpose2d(x, f, stride=2, groups=3)
    assert torch.equal(resample(x, mode, (1, 1)), generic) and torch.equal(resample(x, mode, (0, 1, 1, 0)), generic)
    assert resample(x, "keep", (1, 1)) is x


def test_no_label_is_no_condition():
    """Label -1 is the same as no condition at all, bit for bit, and every other label is not."""
    net, (x, c_noise, _) = tiny(), inputs()
    nothing = net(x, c_noise, None)
    assert torch.equal(net(x, c_noise, {"labels": torch.tensor([-1, -1, -1])}), nothing)
    mixed = net(x, c_noise, {"labels": torch.tensor([-1, 0, 2])})
    assert torch.equal(mixed[0], nothing[0]) and all((mixed[i] - nothing[i]).abs().max() > 1e-3 for i in (1, 2))


def test_samples_are_independent():
    """A sample's output depends on its own image, noise level and label alone."""
    net, (x, c_noise, cond) = tiny(), inputs()
    before = net(x, c_noise, cond)
    x[1:] = torch.randn_like(x[1:])
    after = net(x, torch.tensor([c_noise[0], 0.3, 0.4]), {"labels": torch.tensor([cond["labels"][0], 2, 2])})
    assert torch.equal(before[0], after[0]) and (before[1:] - after[1:]).abs().amax((1, 2, 3)).min() > 1e-3
    assert_close(net(x[:1], c_noise[:1], {"labels": cond["labels"][:1]}), before[:1], rtol=1e-9, atol=1e-12)


def test_every_parameter_counts():
    """Every parameter of the network reaches its output."""
    net = tiny()
    net(*inputs(4)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_features_are_the_last_encoder_output():
    """The features are what the last encoder block puts out, of the stated size, with or without the rest of the pass."""
    net, x = tiny(), inputs()
    seen = []
    list(net.enc.values())[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    output, features = net(*x, features=True)
    nothing, alone = net(*x, features="only")
    assert torch.equal(features, seen[0]) and torch.equal(alone, features) and nothing is None
    assert torch.equal(output, net(*x))
    assert features.shape == (3, net.feature_channels, net.feature_resolution, net.feature_resolution)


@pytest.mark.parametrize("width, per_head, heads", [(64, 64, 1), (192, 64, 3), (160, 64, 2), (63, 64, 0), (16, 64, 0)])
def test_heads(width, per_head, heads):
    """A block has as many whole heads as fit its width, and no attention at all where none does."""
    block = Block(width, width, 4, attention=True, channels_per_head=per_head)
    assert block.num_heads == heads
    assert (block.attn_qkv is None) == (block.attn_proj is None) == (heads == 0)
    assert block(torch.randn(1, width, 2, 2), torch.randn(1, 4)).isfinite().all()


def test_where_attention_is():
    """Attention is in the innermost in0 and in blocks at its resolutions, never in in1, down or up."""
    net = EDM2UNet(16, 1, model_channels=8, channel_mult=(1, 1, 1), num_blocks=1, attn_resolutions=(8,), channels_per_head=8)
    found = {f"{part}.{name}" for part in ("enc", "dec") for name, m in getattr(net, part).items() if getattr(m, "num_heads", 0)}
    assert found == {"enc.8x8_block0", "dec.4x4_in0", "dec.8x8_block0", "dec.8x8_block1"}


def hand_normalized(x, axis):
    return x / (1e-4 + np.sqrt((x**2).mean(axis, keepdims=True)))


def hand_layer(layer, x):
    """A linear or 1x1 layer over axis 1 of a numpy array."""
    w = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
    w = hand_normalized(w, 1) / sqrt(w.shape[1])
    return np.einsum("oi,bi...->bo...", w, x)


def hand_attention(block, x, heads):
    """One query at a time: channel (head * c + channel) * 3 + {0, 1, 2} holds q, k and v."""
    batch, channels, height, width = x.shape
    c = channels // heads
    qkv = hand_layer(block.attn_qkv, x.reshape(batch, channels, -1))
    out = np.zeros((batch, channels, height * width))
    for b in range(batch):
        for head in range(heads):
            q, k, v = (np.stack([qkv[b, (head * c + i) * 3 + part] for i in range(c)]) for part in range(3))
            q, k, v = (hand_normalized(part, 0) for part in (q, k, v))
            for query in range(height * width):
                weights = np.exp(q[:, query] @ k / sqrt(c))
                out[b, head * c:(head + 1) * c, query] = v @ (weights / weights.sum())
    return hand_layer(block.attn_proj, out).reshape(x.shape)


def test_attention_formula():
    """Attention is its formula worked out by hand: q, k, v interleaved innermost, each of unit magnitude over a head."""
    torch.manual_seed(0)
    block = Block(8, 8, 4, attention=True, channels_per_head=4).double()
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    assert_close(block.attention(x).detach().numpy(), hand_attention(block, x.numpy(), heads=2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flavor, mode, clip", [
    ("enc", "keep", 256), ("enc", "down", 256), ("dec", "keep", 0.8), ("dec", "up", None),
])
def test_block_formula(flavor, mode, clip):
    """A block is its formula worked out by hand, in the encoder's order (skip, norm, branch) and the decoder's (branch, skip)."""
    torch.manual_seed(0)
    settings = dict(attention=True, channels_per_head=4, clip_act=clip, res_balance=0.2, attn_balance=0.4)
    block = awake(Block(6, 8, 5, flavor, mode, **settings)).double()
    x, emb = torch.randn(2, 6, 4, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = block(x, emb).detach()

    def conv3x3(layer, x):
        w = hand_normalized(layer.weight.detach().numpy().reshape(len(layer.weight), -1), 1) / sqrt(layer.weight[0].numel())
        return F.conv2d(torch.tensor(x), torch.tensor(w.reshape(layer.weight.shape)), padding=1).numpy()

    def silu(x):
        return x / (1 + np.exp(-x)) / 0.596

    x = x.numpy()
    if mode == "down":
        x = x.reshape(2, 6, 2, 2, 2, 2).mean((3, 5))
    if mode == "up":
        x = x.repeat(2, 2).repeat(2, 3)
    if flavor == "enc":
        x = hand_normalized(hand_layer(block.conv_skip, x), 1)
    scale = 1 + 0.75 * hand_layer(block.emb_linear, emb.numpy())
    y = conv3x3(block.conv_res1, silu(conv3x3(block.conv_res0, silu(x)) * scale[:, :, None, None]))
    x = hand_layer(block.conv_skip, x) if flavor == "dec" else x
    x = (0.8 * x + 0.2 * y) / sqrt(0.8**2 + 0.2**2)
    x = (0.6 * x + 0.4 * hand_attention(block, x, heads=2)) / sqrt(0.6**2 + 0.4**2)
    x = x if clip is None else np.clip(x, -clip, clip)
    assert_close(found.numpy(), x, rtol=1e-9, atol=1e-12)


def test_embedding_formula():
    """The embedding is the balanced sum of noise features and sqrt(label_dim) times the label's column, through mp_silu."""
    net, (_, c_noise, cond) = tiny(label_balance=0.3), inputs()
    onehot = np.eye(3)[[0, 0, 1]] * [[0], [1], [1]]
    features = sqrt(2) * np.cos(np.outer(c_noise, net.emb_fourier.freqs) + net.emb_fourier.phases.numpy())
    emb = (0.7 * hand_layer(net.emb_noise, features) + 0.3 * hand_layer(net.emb_label, onehot * sqrt(3))) / sqrt(0.58)
    expected = emb / (1 + np.exp(-emb)) / 0.596
    assert_close(net.embedding(c_noise, cond).detach().numpy(), expected, rtol=1e-7, atol=1e-9)


def test_network_wiring():
    """The decoder takes the encoder's outputs in reverse, each in its share, and the input has a channel of ones."""
    net, (x, c_noise, cond) = tiny(concat_balance=0.3), inputs()
    emb, e, d = net.embedding(c_noise, cond), net.enc, net.dec
    skip0 = e["8x8_conv"](torch.cat([x, torch.ones(3, 1, 8, 8)], dim=1))
    skip1 = e["8x8_block0"](skip0, emb)
    skip2 = e["4x4_down"](skip1, emb)
    skip3 = e["4x4_block0"](skip2, emb)
    y = d["4x4_in1"](d["4x4_in0"](skip3, emb), emb)
    y = d["4x4_block1"](mp_cat(d["4x4_block0"](mp_cat(y, skip3, 0.3), emb), skip2, 0.3), emb)
    y = d["8x8_block0"](mp_cat(d["8x8_up"](y, emb), skip1, 0.3), emb)
    y = d["8x8_block1"](mp_cat(y, skip0, 0.3), emb)
    assert_close(net(x, c_noise, cond), 0.75 * net.out_conv(y), rtol=1e-9, atol=1e-12)


def test_dropout_only_in_training():
    """Dropout changes the output in training mode alone, and by the factor that keeps its expectation."""
    net, x = tiny(dropout=0.5), inputs()
    assert not torch.equal(net.train()(*x), net.train()(*x))
    assert torch.equal(net.eval()(*x), tiny()(*x))


def test_half_precision_weights():
    """In bfloat16 the network stays within a few percent of itself in float64."""
    expected, found = tiny()(*inputs()), tiny(torch.bfloat16)(*inputs())
    assert found.dtype == torch.bfloat16
    assert rms(found.double() - expected) < 0.05 * rms(expected)


def test_config_makes_the_same_network():
    """A network built from another's configuration takes its weights and gives its output bit for bit."""
    net, x = tiny(resample_filter=[1, 3, 3, 1], clip_act=None), inputs()
    again = EDM2UNet(**net.config).double()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(*x), net(*x))


def test_logvar():
    """The log-variance is one weighted mean of Fourier features a noise level, in float32."""
    torch.manual_seed(0)
    logvar, c_noise = LogVar(16), torch.linspace(-1.5, 1, 5)
    features = logvar.fourier(c_noise)
    weight = logvar.linear.weight[0]
    expected = features @ weight / weight.square().mean().sqrt() / 4
    assert_close(logvar(c_noise), expected, rtol=1e-3, atol=1e-3)
    assert logvar.bfloat16()(c_noise).dtype == torch.float32


def snapshot():
    """A denoiser, and its tensors under the public names: other prefixes, and gains without dimensions."""
    denoiser = Denoiser(tiny(torch.float32), EDM(sigma_data=0.6), "edm", LogVar(16))
    names = {"backbone.": "unet.", "logvar.fourier.": "logvar_fourier.", "logvar.linear.": "logvar_linear."}
    tensors = {}
    for key, value in denoiser.state_dict().items():
        old = next(prefix for prefix in names if key.startswith(prefix))
        tensors[names[old] + key.removeprefix(old)] = value[0] if key.endswith("gain") else value
    return denoiser.eval(), tensors, {**TINY, "use_fp16": True, "sigma_data": 0.6, "logvar_channels": 16}


def test_public_snapshot_round_trip():
    """A network read from a snapshot under its public names, frozen, gives its origin's output and log-variance bit for bit."""
    denoiser, tensors, config = snapshot()
    assert all(tensors[key].ndim == 0 for key in tensors if key.endswith("gain"))
    found = from_nvlabs(config, tensors)
    x, _, cond = inputs(dtype=torch.float32)
    t = torch.tensor([0.01, 0.6, 40.0])
    assert torch.equal(found(x, t, cond), denoiser(x, t, cond)) and torch.equal(found.logvar(t), denoiser.logvar(t))
    assert found.schedule.sigma_data == 0.6 and not found.training and not any(p.requires_grad for p in found.parameters())


def test_public_names():
    """The parameters bear the names of the public snapshots."""
    _, tensors, _ = snapshot()
    block = {"emb_gain", "conv_res0.weight", "emb_linear.weight", "conv_res1.weight"}
    attention, skip = {"attn_qkv.weight", "attn_proj.weight"}, {"conv_skip.weight"}
    blocks = {
        "enc.8x8_block0": block, "enc.4x4_down": block, "enc.4x4_block0": block | attention | skip,
        "dec.4x4_in0": block | attention, "dec.4x4_in1": block,
        "dec.4x4_block0": block | attention | skip, "dec.4x4_block1": block | attention | skip,
        "dec.8x8_up": block, "dec.8x8_block0": block | skip, "dec.8x8_block1": block | skip,
    }
    expected = {f"unet.{name}.{part}" for name, parts in blocks.items() for part in parts}
    expected |= {"unet.out_gain", "unet.out_conv.weight", "unet.enc.8x8_conv.weight", "unet.emb_noise.weight",
                 "unet.emb_label.weight", "unet.emb_fourier.freqs", "unet.emb_fourier.phases",
                 "logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"}
    assert tensors.keys() == expected


@pytest.mark.parametrize("damage", [
    lambda tensors: tensors.pop("unet.out_gain"),
    lambda tensors: tensors.pop("logvar_linear.weight"),
    lambda tensors: tensors.update({"unet.extra.weight": torch.ones(2, 2)}),
    lambda tensors: tensors.update({"out_gain": tensors.pop("unet.out_gain")}),
    lambda tensors: tensors.update({"unet.out_conv.weight": tensors["unet.out_conv.weight"][:1]}),
    lambda tensors: tensors.update({"unet.emb_noise.weight": tensors["unet.emb_noise.weight"].flatten()}),
], ids=["missing", "no-logvar", "extra", "no-prefix", "too-small", "flat"])
def test_snapshot_that_does_not_fit(damage):
    """A snapshot with a tensor missing, left over or of another shape is refused."""
    _, tensors, config = snapshot()
    damage(tensors)
    with pytest.raises(ValueError, match="not of an EDM2 network"):
        from_nvlabs(config, tensors)
