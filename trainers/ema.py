"""Exponential moving averages of the weights, sharded: each rank averages only its own slice of the float32 masters.

Averaged weights of bfloat16 networks would never move at these decay rates; masters do. Decay counts images, not steps.
Power-function profiles are those of Karras et al. 2024, section 3: each is named by its relative width sigma_rel.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainers.config import require

RAMP = 0.09  # a half-life grows with the run up to its value: at most this share of the images seen


@dataclass(frozen=True)
class EmaConfig:
    """Which averages to keep; the first is the run's result, and without any the weights themselves are."""

    sigma_rel: tuple[float, ...] = (0.1,)  # power-function profiles, each in (0, 0.2886)
    halflife: tuple[float, ...] = ()  # classic profiles: images after which a weight counts half

    def check(self) -> None:
        """Raise ConfigError for what cannot work."""
        for s in self.sigma_rel:
            require(0 < s < 12**-0.5, f"ema.sigma_rel has {s}, and must lie in (0, {12**-0.5:.4f})")
        for h in self.halflife:
            require(h > 0, f"ema.halflife has {h}, and must be above 0")

    def names(self) -> list[str]:
        return [f"power-{s:.3f}" for s in self.sigma_rel] + [f"halflife-{h:g}" for h in self.halflife]


def sigma_rel_from_gamma(g):
    """Relative width of the power function t^gamma (equation 3)."""
    g = np.asarray(g, dtype=np.float64)
    return np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))[()]


def gamma_from_sigma_rel(s):
    """Exponent of the power-function profile with relative width s in (0, 12^-1/2): the largest root of a cubic (section 3.1)."""
    s = np.asarray(s, dtype=np.float64)
    if np.any(s <= 0) or np.any(s > 12**-0.5):
        raise ValueError(f"sigma_rel is {s[()]}, and must lie in (0, {12**-0.5:.4f}]")
    roots = [np.roots([1, 7, 16 - v**-2, 12 - v**-2]).real.max() for v in s.flatten()]
    return np.array(roots).reshape(s.shape)[()]


def power_beta(images: float, batch: float, gamma: float) -> float:
    """Decay of the step that ends at `images` seen: (1 - batch / images)^(gamma + 1). The first step replaces the average."""
    return (1 - batch / images) ** (gamma + 1)


def halflife_beta(images: float, batch: float, halflife: float) -> float:
    return 0.5 ** (batch / min(halflife, images * RAMP))


def posthoc_weights(in_images, in_sigma_rel, out_images, out_sigma_rel) -> np.ndarray:
    """Coefficients [n_in, n_out] that combine stored averages into ones of other profiles (algorithm 3). Columns sum to 1.

    Inputs are stored averages, each at (in_images, in_sigma_rel); outputs likewise. Float64: the system's condition number
    reaches thousands.
    """
    t_in, t_out = (np.asarray(t, dtype=np.float64).reshape(-1) for t in (in_images, out_images))
    g_in, g_out = (np.atleast_1d(gamma_from_sigma_rel(s)).reshape(-1) for s in (in_sigma_rel, out_sigma_rel))
    A = _profile_product(t_in[:, None], g_in[:, None], t_in[None], g_in[None])
    B = _profile_product(t_in[:, None], g_in[:, None], t_out[None], g_out[None])
    X = np.linalg.solve(A, B)
    return X / X.sum(axis=0)


def _profile_product(ta, ga, tb, gb):
    """Inner product of the power functions that end at ta and tb (equation 152)."""
    ratio = ta / tb
    exponent = np.where(ta < tb, gb, -ga)
    return (ga + 1) * (gb + 1) * ratio**exponent / ((ga + gb + 1) * np.maximum(ta, tb))


class ShardedEMA:
    """The averages of one engine's master weights, for every profile at once."""

    def __init__(self, engine, config: EmaConfig):
        self.engine, self.config = engine, config
        self.masters = [shard.tensor for shard in engine.master_shards()]
        self.averages = {name: [m.detach().clone() for m in self.masters] for name in config.names()}
        self.gammas = [float(gamma_from_sigma_rel(s)) for s in config.sigma_rel]

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """Take in the weights of the step that ended at `images` seen and took `batch` of them."""
        betas = [power_beta(images, batch, g) for g in self.gammas] + [halflife_beta(images, batch, h) for h in self.config.halflife]
        for average, beta in zip(self.averages.values(), betas):
            torch._foreach_lerp_(average, self.masters, 1 - beta)

    def shards(self, name: str) -> list:
        """One profile's average, laid out like `Engine.master_shards`."""
        return [replace(shard, tensor=average) for shard, average in zip(self.engine.master_shards(), self.averages[name])]

    def gather(self, name: str | None = None) -> dict[str, Tensor]:
        """One profile as full float32 tensors on the host, with the network's buffers. None: the first, or the weights where there is none.

        Every rank calls it.
        """
        name = name or next(iter(self.averages), None)
        return {**self.engine.buffers(), **self.engine.gather(self.shards(name) if name else self.engine.master_shards())}

    def restart(self) -> None:
        """Forget all but the weights as they are now."""
        for average in self.averages.values():
            torch._foreach_copy_(average, self.masters)

    def load(self, read) -> None:
        """From a checkpoint: read(kind, name, start, length), as in `Engine.load`."""
        for profile in self.averages:
            for shard in self.shards(profile):
                shard.tensor.copy_(read(f"ema-{profile}", shard.name, shard.offset, len(shard.tensor)))
