"""Discriminators: small heads on a diffusion network's bottleneck features (Yin et al. 2024, section 4.3)."""

import torch
from torch import Tensor, nn

from models.conditioning import concatenate

from models.denoiser import at_least_float32


class DiscriminatorHead(nn.Module):
    """Features [B, C, R, R] -> logits [B]. Strided convolutions down to one pixel; R is a power of two.

    Each one is GroupNorm and SiLU behind a 4x4 convolution, as in the published heads; what is left at R <= 4 goes in one.
    """

    def __init__(self, channels: int, resolution: int):
        super().__init__()
        self.config = dict(channels=channels, resolution=resolution)
        layers = []
        while resolution > 4:
            layers += self._layer(channels, kernel=4, stride=2, padding=1)
            resolution //= 2
        layers += self._layer(channels, kernel=resolution, stride=1, padding=0)
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    @staticmethod
    def _layer(channels, kernel, stride, padding):
        # At one pixel a group of two channels would keep nothing but a sign: eight at least.
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels >= 8 * g or g == 1))
        return [nn.Conv2d(channels, channels, kernel, stride, padding), nn.GroupNorm(groups, channels), nn.SiLU()]

    def forward(self, features: Tensor) -> Tensor:
        return at_least_float32(self.layers(features.to(self.layers[0].weight.dtype)))[:, 0, 0, 0]


class StepDiscriminator(nn.Module):
    """Whether a step landed where the teacher lands (Lin et al. 2024, "SDXL-Lightning", section 3.2): logits [B].

    x_t and t are where it landed, `source` and `source_t` where it started. Both pass through the encoder of the same denoiser. Without a
    source the verdict is on the landing alone (section 3.3).
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        channels, resolution = denoiser.backbone.feature_channels, denoiser.backbone.feature_resolution
        self.denoiser, self.disc = denoiser, DiscriminatorHead(2 * channels, resolution)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict | None = None, source: Tensor | None = None, source_t: Tensor | None = None) -> Tensor:
        if source is None:
            _, features = self.denoiser(x_t, t, cond, features="only")
            return self.disc(torch.cat([features, torch.zeros_like(features)], dim=1))
        both = None if cond is None else concatenate(cond, cond)
        _, features = self.denoiser(torch.cat([x_t, source]), torch.cat([t, source_t]), both, features="only")
        return self.disc(torch.cat(features.chunk(2), dim=1))

    def train_what_takes_part(self, channels: int, resolution: int, classes: int) -> None:
        """Take gradients for what a verdict depends on alone: not for the decoder, whose gradients DDP would wait for in vain."""
        x, t = torch.zeros(2, channels, resolution, resolution), torch.ones(2)
        self.requires_grad_(True)
        self(x, t, {"labels": torch.zeros(2, dtype=torch.long)} if classes else None, x, t).sum().backward()
        for p in self.parameters():
            p.requires_grad_(p.grad is not None)
            p.grad = None
