"""The discriminator of DMD2: a small head on the fake score's bottleneck features (Yin et al. 2024, section 4.3)."""

from torch import Tensor, nn

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
