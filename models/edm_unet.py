"""EDM's networks (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"), the original teachers of DMD.

SongUNet is DDPM++ and NCSN++ (Song et al. 2021), DhariwalUNet is ADM (Dhariwal & Nichol 2021). Parameters and buffers bear the
names of the public snapshots, so that `from_edm` loads them as they are.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.denoiser import Denoiser, at_least_float32
from models.schedules import EDM


class Conv(nn.Module):
    """A convolution after halving ("down") or doubling ("up") the resolution, or "keep"; kernel 0: resampling alone.

    taps: the 1-D low-pass filter of resampling. fused: the convolution comes before the filter, which sees no padding but the convolution's.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, mode: str = "keep", taps=(1, 1), fused: bool = False):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel) if kernel else None
        self.weight, self.bias = (conv.weight, conv.bias) if kernel else (None, None)
        self.kernel, self.mode, self.fused, self.pad = kernel, mode, fused, (len(taps) - 1) // 2
        if mode != "keep":
            f = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(f, f) / f.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.resample(F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2 + self.pad), 0)
        x = x if self.mode == "keep" else self.resample(x, self.pad)
        return F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2) if self.kernel else x

    def resample(self, x: Tensor, pad: int) -> Tensor:
        f = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        if self.mode == "down":
            return F.conv2d(x, f, stride=2, padding=pad, groups=x.shape[1])
        return F.conv_transpose2d(x, 4 * f, stride=2, padding=pad, groups=x.shape[1])


def norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class EDMBlock(nn.Module):
    """Residual block, modulated by the embedding (its shift, or scale and shift if `adaptive`), then attention if it has heads.

    heads: None for one to every 64 channels, so a narrower block has none. project: the shortcut of a resampling block has a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, mode: str = "keep", attention: bool = False, *,
                 heads: int | None, adaptive: bool, project: bool, skip_scale: float, eps: float, taps, dropout: float):
        super().__init__()
        self.heads = 0 if not attention else out_channels // 64 if heads is None else heads
        self.adaptive, self.skip_scale, self.dropout = adaptive, skip_scale, dropout
        self.norm0 = norm(in_channels, eps)
        self.conv0 = Conv(in_channels, out_channels, 3, mode, taps)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive else 1))
        self.norm1 = norm(out_channels, eps)
        self.conv1 = Conv(out_channels, out_channels, 3)
        kernel = 1 if out_channels != in_channels or project and mode != "keep" else 0
        self.skip = Conv(in_channels, out_channels, kernel, mode, taps) if kernel or mode != "keep" else None
        if self.heads:
            self.norm2 = norm(out_channels, eps)
            self.qkv = Conv(out_channels, 3 * out_channels, 1)
            self.proj = Conv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None]
        if self.adaptive:
            scale, shift = modulation.chunk(2, dim=1)
            y = self.norm1(y) * (1 + scale) + shift
        else:
            y = self.norm1(y + modulation)
        y = self.conv1(F.dropout(F.silu(y), self.dropout, self.training))
        x = (y + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (self.attention(x) + x) * self.skip_scale if self.heads else x

    def attention(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(B, self.heads, C // self.heads, 3, H * W)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind(0)  # each [B, heads, HW, channels]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(2, 3).reshape(B, C, H, W))


def positional(x: Tensor, count: int, endpoint: bool) -> Tensor:
    """c_noise [B] -> angles [B, count] of geometrically falling frequencies, from 1 to 1/10000 (`endpoint`: inclusive), in float32."""
    x = at_least_float32(x)
    powers = torch.arange(count, dtype=x.dtype, device=x.device) / (count - endpoint)
    return x.outer((1 / 10_000) ** powers)


class Fourier(nn.Module):
    """c_noise [B] -> angles [B, count] of random frequencies, in float32."""

    def __init__(self, count: int, bandwidth: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", bandwidth * torch.randn(count))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return x.outer(2 * math.pi * self.freqs.to(x.dtype))


class Kept(nn.Module):
    """The weight of a layer that only the original's training calls. A buffer, for nothing here trains it."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_channels, in_channels))


class UNet(nn.Module):
    """What the two networks share.

    x [B, img_channels, R, R], c_noise [B], cond {"labels": [B]} -> [B, img_channels, R, R]. `features` are the last encoder
    output, [B, C, R / 2^levels, ...]. Labels of -1, or cond None, are the all-zero label.
    """

    def __init__(self, arguments: dict):
        super().__init__()
        self.config = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in arguments.items() if k not in ("self", "__class__")}
        self.widths = [self.config["model_channels"] * m for m in self.config["channel_mult"]]
        self.names = [f"{r}x{r}" for r in (self.config["img_resolution"] >> level for level in range(len(self.widths)))]
        self.attends = [self.config["img_resolution"] >> level in self.config["attn_resolutions"] for level in range(len(self.widths))]
        self.feature_resolution = self.config["img_resolution"] >> (len(self.widths) - 1)

    def _encoder(self, block, channels: int, kind: str = "standard", taps=(1, 1)) -> list[int]:
        """Makes `enc`. block: makes an EDMBlock. channels: of the first layer. -> the width of every skip."""
        self.enc, skips, aux = nn.ModuleDict(), [channels], self.config["img_channels"]
        for level, (r, width) in enumerate(zip(self.names, self.widths)):
            if level == 0:
                self.enc[f"{r}_conv"] = Conv(aux, channels, 3)
            else:
                self.enc[f"{r}_down"] = block(channels, channels, mode="down")
                skips.append(channels)
            if level and kind == "skip":
                self.enc[f"{r}_aux_down"], self.enc[f"{r}_aux_skip"] = Conv(aux, aux, 0, "down", taps), Conv(aux, channels, 1)
            if level and kind == "residual":
                self.enc[f"{r}_aux_residual"] = Conv(aux, channels, 3, "down", taps, fused=True)
                aux = channels
            for i in range(self.config["num_blocks"]):
                self.enc[f"{r}_block{i}"] = block(channels, width, attention=self.attends[level])
                channels = width
                skips.append(channels)
        self.feature_channels = channels
        return skips

    def _decoder(self, block, skips: list[int], every: bool, kind: str | None = None, taps=(1, 1)) -> None:
        """Makes `dec`. every: whether every block attends that may, or a level's last. kind: where the image is made; None: not here."""
        self.dec, channels, image, lowest = nn.ModuleDict(), skips[-1], self.config["img_channels"], len(self.widths) - 1
        for level in reversed(range(len(self.widths))):
            r, width, last = self.names[level], self.widths[level], self.config["num_blocks"]
            if level == lowest:
                self.dec[f"{r}_in0"], self.dec[f"{r}_in1"] = block(channels, channels, attention=True), block(channels, channels)
            else:
                self.dec[f"{r}_up"] = block(channels, channels, mode="up")
            for i in range(last + 1):
                self.dec[f"{r}_block{i}"] = block(channels + skips.pop(), width, attention=self.attends[level] and (every or i == last))
                channels = width
            if kind == "skip" and level < lowest:
                self.dec[f"{r}_aux_up"] = Conv(image, image, 0, "up", taps)
            if kind == "skip" or kind and level == 0:
                self.dec[f"{r}_aux_norm"], self.dec[f"{r}_aux_conv"] = norm(channels, 1e-6), Conv(channels, image, 3)

    def forward(self, x: Tensor, c_noise: Tensor, cond: dict | None = None, features: bool | str = False):
        x = x.to(self.map_layer0.weight.dtype)
        emb = self.embedding(c_noise, cond)
        skips, aux = [], x
        for name, module in self.enc.items():
            if name.endswith("aux_down"):
                aux = module(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + module(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + module(aux)) * math.sqrt(0.5)
            else:
                x = module(x) if name.endswith("conv") else module(x, emb)
                skips.append(x)
        if features == "only":
            return None, x
        output = self._decode(x, skips, emb)
        return (output, x) if features else output

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        skips, output = list(skips), 0
        for name, module in self.dec.items():
            if name.endswith("aux_up"):
                output = module(output)
            elif name.endswith("aux_norm"):
                y = F.silu(module(x))
            elif name.endswith("aux_conv"):
                output = module(y) + output
            else:
                x = module(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return output if self.out_conv is None else self.out_conv(F.silu(self.out_norm(x)))

    def classes(self, c_noise: Tensor, cond: dict | None) -> Tensor:
        """The labels, one-hot, of the weights' type."""
        labels = c_noise.new_full(c_noise.shape, -1, dtype=torch.long) if cond is None else cond["labels"]
        onehot = F.one_hot(labels.clamp(min=0), self.config["label_dim"]) * (labels >= 0)[:, None]
        return onehot.to(self.map_label.weight.dtype)


class SongUNet(UNet):
    """DDPM++ (the defaults) and NCSN++. encoder_type, decoder_type: how the image enters, or is summed up, at the lower resolutions."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, augment_dim: int = 0, model_channels: int = 128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb: int = 4, num_blocks: int = 4, attn_resolutions=(16,), dropout: float = 0.1,
                 embedding_type: str = "positional", channel_mult_noise: int = 1, encoder_type: str = "standard",
                 decoder_type: str = "standard", resample_filter=(1, 1)):
        super().__init__(locals())
        for name, known in CHOICES.items():
            if self.config[name] not in known:
                raise ValueError(f"{name} {self.config[name]!r} is not one of {', '.join(known)}")
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self.map_noise = partial(positional, count=noise // 2, endpoint=True) if embedding_type == "positional" else Fourier(noise // 2)
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = Kept(augment_dim, noise) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        block = partial(EDMBlock, emb_channels=emb, heads=1, adaptive=False, project=True, skip_scale=math.sqrt(0.5), eps=1e-6,
                        taps=resample_filter, dropout=dropout)
        skips = self._encoder(block, model_channels, encoder_type, resample_filter)
        self._decoder(block, skips, False, decoder_type, resample_filter)
        self.out_conv = None

    def embedding(self, c_noise: Tensor, cond: dict | None) -> Tensor:
        angles = self.map_noise(c_noise)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.map_layer0.weight.dtype)
        if self.map_label is not None:
            emb = emb + self.map_label(self.classes(c_noise, cond) * math.sqrt(self.config["label_dim"]))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(UNet):
    """ADM."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, augment_dim: int = 0, model_channels: int = 192,
                 channel_mult=(1, 2, 3, 4), channel_mult_emb: int = 4, num_blocks: int = 3, attn_resolutions=(32, 16, 8), dropout: float = 0.1):
        super().__init__(locals())
        emb = model_channels * channel_mult_emb
        self.map_noise = partial(positional, count=model_channels // 2, endpoint=False)
        self.map_augment = Kept(augment_dim, model_channels) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        block = partial(EDMBlock, emb_channels=emb, heads=None, adaptive=True, project=False, skip_scale=1.0, eps=1e-5, taps=(1, 1), dropout=dropout)
        self._decoder(block, self._encoder(block, self.widths[0]), True)
        self.out_norm, self.out_conv = norm(self.widths[0], 1e-5), Conv(self.widths[0], img_channels, 3)

    def embedding(self, c_noise: Tensor, cond: dict | None) -> Tensor:
        angles = self.map_noise(c_noise)
        emb = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.map_layer0.weight.dtype)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb if self.map_label is None else emb + self.map_label(self.classes(c_noise, cond)))


CHOICES = {"embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "skip", "residual"), "decoder_type": ("standard", "skip")}
NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
OTHERS = ("use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type", "label_dropout")  # arguments that are not the network's own here


def from_edm(config: dict, state_dict: dict[str, Tensor]) -> Denoiser:
    """An EDM network from a public snapshot's constructor arguments (of EDMPrecond) and tensors, under their own names.

    Raises ValueError if tensors are missing, left over or of another shape.
    """
    kind = config.get("model_type", "DhariwalUNet")
    if kind not in NETWORKS:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(NETWORKS)}")
    network = NETWORKS[kind](**{k: v for k, v in config.items() if k not in OTHERS})
    try:
        nn.ModuleDict({"model": network}).load_state_dict({name: value.float() for name, value in state_dict.items()})
    except RuntimeError as error:
        raise ValueError(f"these weights are not of an EDM network with that configuration: {error}") from None
    return Denoiser(network, EDM(sigma_data=config.get("sigma_data", 0.5)), "edm").eval().requires_grad_(False)
