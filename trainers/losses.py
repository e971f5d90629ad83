"""Losses, as pure functions: no network is called and no random number drawn in here.

They return one value a sample, [B], a mean over the sample's elements; the caller takes the mean over the batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.denoiser import at_least_float32


def per_sample(x: Tensor) -> Tensor:
    """[B, ...] -> [B], the mean over each sample."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


# --- denoising -------------------------------------------------------------------------------------------------------------


def denoising_loss(x0_pred: Tensor, x0: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """weight * |x0_pred - x0|^2. weight: [B]; alpha^2 / sigma^2 makes it the error of eps."""
    return weight * per_sample((at_least_float32(x0_pred) - at_least_float32(x0)).square())


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) [B], which makes the loss of an untrained EDM network 1 at every noise level (Karras et al. 2022, section 5)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def edm2_loss(x0_pred: Tensor, x0: Tensor, sigma: Tensor, logvar: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) / e^u |x0_pred - x0|^2 + u, with the learned log-variance u [B] (Karras et al. 2024, equation 14)."""
    return denoising_loss(x0_pred, x0, edm_weight(sigma, sigma_data)) / logvar.exp() + logvar


# --- progressive distillation ----------------------------------------------------------------------------------------------

WEIGHTS = ("snr_trunc", "snr", "snr_plus_one", "constant")


def progressive_target(x1: Tensor, x2: Tensor, at_t: tuple, at_mid: tuple, at_s: tuple) -> Tensor:
    """The x0 from which one DDIM step t -> s lands where two land, t -> mid by x1 and mid -> s by x2.

    at_*: (alpha, sigma), each [B] or a number. A convex combination, (1 - c) x1 + c x2 with c = 1 where sigma_s = 0: equal to
    equation 43 of Salimans & Ho 2022, without its cancellation. More than two steps are put together pair by pair.
    """
    (alpha_t, sigma_t), (alpha, sigma), (alpha_s, sigma_s) = ((torch.as_tensor(v, dtype=torch.float64) for v in at) for at in (at_t, at_mid, at_s))
    c = sigma_t * (alpha_s * sigma - alpha * sigma_s) / (sigma * (alpha_s * sigma_t - alpha_t * sigma_s))
    x1, x2 = at_least_float32(x1), at_least_float32(x2)
    return torch.lerp(x1, x2, c.to(x1).view(-1, *[1] * (x1.ndim - 1)))


def progressive_weight(alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """Weight of x0's squared error: SNR = alpha^2 / sigma^2 cut off from below at 1, plain, plus 1, or constant (section 4)."""
    snr = (alpha / sigma) ** 2
    weights = {"snr_trunc": snr.clamp(min=1), "snr": snr, "snr_plus_one": 1 + snr, "constant": torch.ones_like(snr)}
    if kind not in weights:
        raise ValueError(f"weight {kind!r} is not one of {', '.join(weights)}")
    return weights[kind]


# --- distribution matching -------------------------------------------------------------------------------------------------


def dmd_gradient(x_gen: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """The direction away from real, (x0_fake - x0_real) / mean|x_gen - x0_real|, in float32 and without graph.

    The mean is over each sample alone, so that no sample's step depends on its neighbours in the batch
    (Yin et al. 2023, equations 7 and 8, in terms of x0).
    """
    with torch.no_grad():
        x_gen, x0_real, x0_fake = (at_least_float32(x) for x in (x_gen, x0_real, x0_fake))
        scale = (x_gen - x0_real).abs().flatten(1).mean(1).clamp_min(1e-8)
        return (x0_fake - x0_real) / scale.view(-1, *[1] * (x_gen.ndim - 1))


def dmd_loss(x_gen: Tensor, gradient: Tensor) -> Tensor:
    """1/2 |x - sg(x - g)|^2: its derivative by x_gen is the gradient, divided by the number of elements."""
    x_gen = at_least_float32(x_gen)
    return 0.5 * per_sample((x_gen - (x_gen - gradient).detach()).square())


# --- adversarial -----------------------------------------------------------------------------------------------------------


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """-log D(fake), non-saturating (Yin et al. 2024, equation 4)."""
    return per_sample(F.softplus(-fake_logits))


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(fake))."""
    return per_sample(F.softplus(-real_logits)) + per_sample(F.softplus(fake_logits))


# --- regression on noise-image pairs (DMD v1) ------------------------------------------------------------------------------


def regression_loss(x_gen: Tensor, y: Tensor, distance: str | Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Distance of the generator's image to the teacher's for the same noise: "l2", "huber", or a function such as LPIPS."""
    x_gen, y = at_least_float32(x_gen), at_least_float32(y)
    if distance == "l2":
        return per_sample((x_gen - y).square())
    if distance == "huber":
        c = 0.00054 * x_gen[0].numel() ** 0.5  # the scale of Song & Dhariwal 2023, section 3.3
        return ((x_gen - y).square().flatten(1).sum(1) + c**2).sqrt() - c
    if isinstance(distance, str):
        raise ValueError(f'distance {distance!r} is not "l2", "huber" or a function')
    return distance(x_gen, y).flatten()
