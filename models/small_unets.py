"""Two small DDPM networks, of a student report that distilled them with DMD: one for MNIST, one for CelebA at 32x32.

Both keep the contract of EDM2UNet: x [B, img_channels, R, R], c_noise [B] (the level's index from 0), cond {"labels": [B]} ->
[B, img_channels, R, R]. `features` are the bottleneck's map. Labels of -1, or cond None, are no label.
"""

import math
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8  # of every GroupNorm
EMBEDDING = 64  # width of SmallUNet's sinusoids


def label_vectors(c_noise: Tensor, cond: dict | None, label_dim: int) -> Tensor:
    """[B, label_dim], float: one-hot, and all zero where there is no label."""
    labels = c_noise.new_full(c_noise.shape, -1, dtype=torch.long) if cond is None else cond["labels"]
    return F.one_hot(labels.clamp(min=0), label_dim).float() * (labels >= 0)[:, None]


# --- MNIST -----------------------------------------------------------------------------------------------------------------


class StatBatchNorm(nn.BatchNorm2d):
    """BatchNorm that a network of half-precision weights may have too: weight and bias take part in the precision of its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps)


class DoubleConv(nn.Module):
    """Twice convolution, BatchNorm, GELU. residual: the input, or the first convolution's output where widths differ, is added at the end."""

    def __init__(self, channels: int, out: int, residual: bool = False):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(c, out, 3, padding=1), StatBatchNorm(out), nn.GELU()) for c in (channels, out))
        self.residual, self.same_width = residual, channels == out

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        return ((x if self.same_width else first) + second) / math.sqrt(2) if self.residual else second


class ContextUp(nn.Sequential):
    """Twice the resolution, by a learned convolution."""

    def __init__(self, channels: int, out: int):
        super().__init__(nn.ConvTranspose2d(channels, out, 2, 2), DoubleConv(out, out), DoubleConv(out, out))


class VectorMLP(nn.Sequential):
    """[B, inputs] -> [B, out, 1, 1]."""

    def __init__(self, inputs: int, out: int):
        super().__init__(nn.Linear(inputs, out), nn.GELU(), nn.Linear(out, out), nn.Unflatten(1, (out, 1, 1)))


class ContextUNet(nn.Module):
    """The MNIST network: 6,585,601 parameters at 28x28x1, 10 classes and n_feat 128.

    Its bottleneck is pooled to one pixel, so the convolution that unfolds it again is as wide as a quarter of the image, and has its
    parameters: 32x32 is another network than 28x28. The encoder is told neither time nor label; on the way up, at two resolutions, the label
    multiplies and the time is added. BatchNorm's statistics are the batch's own in train mode and stored ones in eval mode.

    levels: the network is told c_noise / levels. A label is minus its one-hot vector, as the context mask of the original has it.
    """

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, n_feat: int = 128, levels: int = 400):
        super().__init__()
        if img_resolution % 4 or n_feat % GROUPS:
            raise ValueError(f"a ContextUNet wants img_resolution {img_resolution} divisible by 4, and n_feat {n_feat} by {GROUPS}")
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, n_feat=n_feat, levels=levels)
        self.label_dim, self.levels = label_dim, levels
        self.feature_channels, self.feature_resolution = 2 * n_feat, img_resolution // 4
        smallest = self.feature_resolution
        self.conv_in = DoubleConv(img_channels, n_feat, residual=True)
        self.down1 = nn.Sequential(DoubleConv(n_feat, n_feat), nn.MaxPool2d(2))
        self.down2 = nn.Sequential(DoubleConv(n_feat, 2 * n_feat), nn.MaxPool2d(2))
        self.time1, self.time2 = VectorMLP(1, 2 * n_feat), VectorMLP(1, n_feat)
        self.label1, self.label2 = (VectorMLP(label_dim, width) if label_dim else None for width in (2 * n_feat, n_feat))
        self.up0 = nn.Sequential(nn.AvgPool2d(smallest), nn.GELU(), nn.ConvTranspose2d(2 * n_feat, 2 * n_feat, smallest, smallest),
                                 nn.GroupNorm(GROUPS, 2 * n_feat), nn.ReLU())
        self.up1, self.up2 = ContextUp(4 * n_feat, n_feat), ContextUp(2 * n_feat, n_feat)
        self.out = nn.Sequential(nn.Conv2d(2 * n_feat, n_feat, 3, padding=1), nn.GroupNorm(GROUPS, n_feat), nn.ReLU(),
                                 nn.Conv2d(n_feat, img_channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, cond: dict | None = None, features: bool | str = False):
        skip = self.conv_in(x.to(self.out[0].weight.dtype))
        down1 = self.down1(skip)
        bottleneck = down2 = self.down2(down1)
        if features == "only":
            return None, bottleneck
        x = self.conditioned(self.up0(down2), c_noise, cond, self.time1, self.label1)
        x = self.conditioned(self.up1(torch.cat([x, down2], dim=1)), c_noise, cond, self.time2, self.label2)
        x = self.up2(torch.cat([x, down1], dim=1))
        output = self.out(torch.cat([x, skip], dim=1))
        return (output, bottleneck) if features else output

    def conditioned(self, x: Tensor, c_noise: Tensor, cond: dict | None, time: nn.Module, label: nn.Module | None) -> Tensor:
        if label is not None:
            x = x * label(-label_vectors(c_noise, cond, self.label_dim).to(x.dtype))
        return x + time((c_noise / self.levels).to(x.dtype)[:, None])


# --- CelebA ----------------------------------------------------------------------------------------------------------------


class SmallBlock(nn.Module):
    """Residual block: GroupNorm, SiLU, convolution, twice, with the embedding added in between."""

    def __init__(self, channels: int, out: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.emb = nn.Linear(EMBEDDING, out)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(F.dropout(F.silu(self.norm2(y)), self.dropout, self.training))


class SmallAttention(nn.Module):
    """Self-attention over all pixels, one head of half the width."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * (channels // 2), bias=False), nn.Linear(channels // 2, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=2)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(x.shape)


class SmallUNet(nn.Module):
    """The CelebA network: 426,691 parameters at 3 channels, model_channels 16 and channel_mult (1, 2, 2), without classes.

    Each multiple is of the level above: widths 16, 32, 64. One block a level down and two up; attention at the lowest resolution and in
    the middle; sines and cosines of the level's index go to every block as they are, with the label's embedding where there are classes.
    """

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, model_channels: int = 16, channel_mult=(1, 2, 2), dropout: float = 0.0):
        super().__init__()
        levels = len(channel_mult)
        if img_resolution % 2 ** (levels - 1) or model_channels % GROUPS:
            raise ValueError(f"a SmallUNet of {levels} levels wants img_resolution {img_resolution} divisible by {2 ** (levels - 1)}, "
                             f"and model_channels {model_channels} by {GROUPS}")
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, model_channels=model_channels,
                           channel_mult=list(channel_mult), dropout=dropout)
        above, *widths = accumulate((model_channels, *channel_mult), mul)
        self.label_dim, self.feature_channels, self.feature_resolution = label_dim, widths[-1], img_resolution >> (levels - 1)
        above = [above, *widths[:-1]]  # the width that each level gets, and gives back
        self.conv_in = nn.Conv2d(img_channels, model_channels, 3, padding=1)
        self.label = nn.Linear(label_dim, EMBEDDING, bias=False) if label_dim else None
        self.down = nn.ModuleList(SmallBlock(a, w, dropout) for a, w in zip(above, widths))
        self.down_attention = SmallAttention(widths[-1])
        self.mid, self.mid_attention = SmallBlock(widths[-1], widths[-1], dropout), SmallAttention(widths[-1])
        self.up = nn.ModuleList(nn.ModuleList([SmallBlock(2 * w, w, dropout), SmallBlock(w + a, a, dropout)]) for a, w in zip(above, widths))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(w, w, 4, 2, 1) for w in widths[:-1])
        self.norm_out, self.conv_out = nn.GroupNorm(GROUPS, model_channels), nn.Conv2d(model_channels, img_channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, cond: dict | None = None, features: bool | str = False):
        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        emb, skips = self.embedding(c_noise, cond).to(x.dtype), []
        for level, block in enumerate(self.down):
            x = F.avg_pool2d(x, 2) if level else x
            skips.append(x)
            x = block(x, emb)
            skips.append(x)
        x = skips[-1] = self.down_attention(x)
        bottleneck = x = self.mid_attention(self.mid(x, emb))
        if features == "only":
            return None, bottleneck
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                x = block(torch.cat([x, skips.pop()], dim=1), emb)
            x = self.enlarge[level - 1](x) if level else x
        output = self.conv_out(F.silu(self.norm_out(x)))
        return (output, bottleneck) if features else output

    def embedding(self, c_noise: Tensor, cond: dict | None) -> Tensor:
        half = EMBEDDING // 2
        angles = c_noise.float()[:, None] * torch.exp(torch.arange(half, device=c_noise.device) * (-math.log(10000) / half))
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.label is None:
            return emb
        return emb + self.label(label_vectors(c_noise, cond, self.label_dim).to(self.label.weight.dtype))
