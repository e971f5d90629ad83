"""The one contract: denoiser(x_t, t, cond) -> x0, whatever the network predicts inside.

`cond` is None or a dict of tensors: "labels" int64 [B] (-1: no label), "prompt_embeds" [B, L, D], "prompt_mask" [B, L],
"pooled" [B, P], "time_ids" [B, 6], "guidance" [B]. Conversions between x0, eps, v and flow happen here and nowhere else, in float32 or better: 1/alpha is
14.6 for SDXL and 157 for DDPM CIFAR-10 at the last step, so half precision would be lost in it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.schedules import EDM, Schedule, expand

PREDICTIONS = ("x0", "eps", "v", "both", "flow", "edm")


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def to_x0(prediction: str, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network predicted -> x0. alpha, sigma: [B]; v = alpha eps - sigma x0, flow = eps - x0.

    "both": x0 and eps, stacked over channels, blended so that neither end divides by zero (Salimans & Ho 2022, section 4).
    """
    output, x_t = at_least_float32(output), at_least_float32(x_t)
    alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
    if prediction == "x0":
        return output
    if prediction == "eps":
        return (x_t - sigma * output) / alpha
    if prediction == "v":
        return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
    if prediction == "both":
        x0, eps = output.chunk(2, dim=1)
        return (sigma**2 * x0 + alpha * (x_t - sigma * eps)) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x_t - sigma * output) / (alpha + sigma)
    raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")


def from_x0(prediction: str, x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0 -> what a network of this prediction would have to output: the inverse of `to_x0`, and for "both" the one that is consistent."""
    x0, x_t = at_least_float32(x0), at_least_float32(x_t)
    alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
    eps = (x_t - alpha * x0) / sigma
    outputs = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "both": torch.cat([x0, eps], dim=1), "flow": eps - x0}
    if prediction not in outputs:
        raise ValueError(f"prediction {prediction!r} is not one of {', '.join(outputs)}")
    return outputs[prediction]


class Denoiser(nn.Module):
    """A network behind the contract.

    backbone(x, c_noise, cond) -> output. One that has features takes `features` too: True -> (output, features),
    "only" -> (None, features), without running what comes after them.
    prediction: "x0" | "eps" | "v" | "both" | "flow", or "edm" for a network inside the preconditioning of Karras et al. 2022
    (equation 7), which wants an EDM schedule. `logvar`: the optional u(t) of EDM2's loss, a module of c_noise.
    """

    def __init__(self, backbone: nn.Module, schedule: Schedule, prediction: str, logvar: nn.Module | None = None):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if prediction == "edm" and not isinstance(schedule, EDM):
            raise ValueError(f'prediction "edm" needs the EDM schedule, not {type(schedule).__name__}')
        self.backbone, self.schedule, self.prediction, self.logvar = backbone, schedule, prediction, logvar

    def forward(self, x_t: Tensor, t: Tensor, cond: dict | None = None, features: bool | str = False):
        """x_t [B, C, H, W], t [B] or 0-d -> x0 [B, C, H, W], or (x0, features). features="only" stops at them: (None, features)."""
        x_t = at_least_float32(x_t)
        t = t.to(x_t.dtype).expand(x_t.shape[0])
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_in = x_t
        if self.prediction == "edm":
            data = self.schedule.sigma_data
            c_skip, c_out, c_in = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt(), 1 / (sigma**2 + data**2).sqrt()
            x_in = expand(c_in, x_t) * x_t
        inputs = (x_in, self.schedule.conditioning(t), cond)
        output, found = self.backbone(*inputs, features=features) if features else (self.backbone(*inputs), None)
        if output is None:
            return None, found
        if self.prediction == "edm":
            x0 = expand(c_skip, x_t) * x_t + expand(c_out, x_t) * at_least_float32(output)
        else:
            x0 = to_x0(self.prediction, output, x_t, alpha, sigma)
        return (x0, found) if features else x0


class Translated:
    """A denoiser asked on another schedule: at its own time of the same signal-to-noise ratio, with its input scaled to match."""

    def __init__(self, denoiser, schedule: Schedule):
        self.denoiser, self.schedule = denoiser, schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict | None = None) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t)
        s = self.denoiser.schedule.at_angle(torch.atan2(sigma, alpha))
        own_alpha, own_sigma = self.denoiser.schedule.alpha_sigma(s)
        scale = ((own_alpha**2 + own_sigma**2) / (alpha**2 + sigma**2)).sqrt()
        return self.denoiser(x_t * expand(scale, x_t).to(x_t.dtype), s, cond)


class Score(NamedTuple):
    x0: Tensor | None  # [B, C, H, W]
    logvar: Tensor | None  # [B]
    logits: Tensor | None  # [B, ...]


class ScoreModel(nn.Module):
    """A denoiser in training: with its log-variance and, as DMD2's fake score, a discriminator on its features.

    One module, because its parts share one optimizer, and every use has to pass through whatever wraps it.
    """

    def __init__(self, denoiser: Denoiser, disc: nn.Module | None = None):
        super().__init__()
        self.denoiser, self.disc = denoiser, disc

    def forward(self, x_t: Tensor, t: Tensor, cond: dict | None = None, denoise: bool = True, logits: bool = False) -> Score:
        """`denoise` asks for x0 and the log-variance, `logits` for the discriminator's verdict on x_t. Logits alone run only the encoder."""
        t = t.expand(len(x_t))
        if logits:
            x0, features = self.denoiser(x_t, t, cond, features=True if denoise else "only")
        else:
            x0 = self.denoiser(x_t, t, cond)
        u = self.denoiser.logvar(self.denoiser.schedule.conditioning(t)) if denoise and self.denoiser.logvar is not None else None
        return Score(x0, u, self.disc(features) if logits else None)
