"""Noise schedules: x_t = alpha_t * x0 + sigma_t * eps, where x0 is data and eps is unit Gaussian noise.

(Some libraries call the noise x_0 and the data x_1. Here it is always the other way round.)

A schedule measures time in its own unit. `t_max` is its pure-noise end, 0 is clean data. Host-side values are
float64; tensors are at least float32, and stay float64 if they come so.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def _tensor(t: Tensor | float) -> Tensor:
    """A time as a tensor of at least float32."""
    if not torch.is_tensor(t):
        return torch.as_tensor(t, dtype=torch.float64)
    return t if t.dtype == torch.float64 else t.float()


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """[B] (or 0-d) -> [B, 1, 1, 1], so that it multiplies a batch of images."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim)) if coefficient.ndim else coefficient


class Schedule(ABC):
    """A noise schedule. A new one defines `t_max`, `alpha_sigma`, `time`, `at_angle` and `config`, and may redefine the rest."""

    t_max: float

    @abstractmethod
    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Times [B] -> (alpha_t [B], sigma_t [B])."""

    @abstractmethod
    def time(self, u: Tensor | float) -> Tensor:
        """Quantile u in [0, 1] -> time. u = 1 is t_max; uniform u samples the schedule's own density of times."""

    @abstractmethod
    def at_angle(self, angle: Tensor) -> Tensor:
        """The time at which atan2(sigma, alpha) is `angle`, or the nearest that a network has seen: how schedules are translated."""

    @abstractmethod
    def config(self) -> dict:
        """The constructor's arguments, JSON-ready."""

    def grid(self, n: int) -> Tensor:
        """n + 1 times, float64, from t_max down to 0. Contains t_max ("trailing" spacing)."""
        return self.time(1 - torch.arange(n + 1, dtype=torch.float64) / n)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for x0, eps [B, C, H, W] and t [B]."""
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    def conditioning(self, t: Tensor) -> Tensor:
        """What the network is told about the noise level: t in the unit that it was trained with."""
        return _tensor(t)

    def noise_scale(self, t: Tensor | float) -> Tensor:
        """Standard deviation of the noise that a sampler starts from at time t: 1 where alpha^2 + sigma^2 = 1."""
        return torch.ones_like(_tensor(t))


class CosineVP(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1].

    `logsnr_max` None: exact, alpha(1) = 0. A number: the log-SNR is clipped to +-logsnr_max by squeezing the angle
    (Salimans & Ho 2022, section 2 and appendix; 20 in their code).
    """

    t_max = 1.0

    def __init__(self, logsnr_max: float | None = None):
        self.logsnr_max = logsnr_max
        self.margin = 0.0 if logsnr_max is None else math.atan(math.exp(-logsnr_max / 2))  # angle cut off at both ends

    def alpha_sigma(self, t):
        t = _tensor(t)
        width = math.pi / 2 - 2 * self.margin
        return torch.sin(width * (1 - t) + self.margin), torch.sin(width * t + self.margin)  # sin(0) is 0 exactly, cos(pi/2) is not

    def time(self, u):
        return _tensor(u)

    def at_angle(self, angle):
        return ((angle - self.margin) / (math.pi / 2 - 2 * self.margin)).clamp(0, 1)

    def config(self):
        return {"logsnr_max": self.logsnr_max}


class DiscreteVP(Schedule):
    """The T discrete levels of DDPM. Time is index + 1 in 1..T; 0 is clean data.

    betas: [T], the variance added at each level. `zero_terminal_snr` rescales them so that alpha_T = 0
    (Lin et al. 2023, algorithm 1). Between levels, alpha^2 is interpolated.
    """

    def __init__(self, betas, zero_terminal_snr: bool = False):
        self.betas = torch.as_tensor(betas, dtype=torch.float64).flatten()
        self.zero_terminal_snr = zero_terminal_snr
        self.t_max = float(len(self.betas))
        alpha = torch.cumprod(1 - self.betas, 0).sqrt()
        if zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        self.bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha**2])  # [T + 1], alpha^2 by time
        self.on = {self.bar.device: self.bar}  # and its copies on other devices

    @classmethod
    def cosine(cls, levels: int) -> "DiscreteVP":
        """CosineVP at t = 1/levels .. 1, with alpha = 0 at the last: what plain diffusers schedulers can follow exactly."""
        bar = torch.cos(torch.arange(levels + 1, dtype=torch.float64) / levels * math.pi / 2) ** 2
        bar[-1] = 0
        return cls(1 - bar[1:] / bar[:-1])

    @classmethod
    def from_scheduler_config(cls, config) -> "DiscreteVP":
        """From the `scheduler_config.json` of a diffusers pipeline. Raises ValueError for a schedule that it cannot represent."""
        T, kind = config["num_train_timesteps"], config.get("beta_schedule", "linear")
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "linear":
            betas = torch.linspace(start, end, T, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
        elif kind == "squaredcos_cap_v2":
            bar = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"beta_schedule {kind!r} is not supported: use linear, scaled_linear, squaredcos_cap_v2 or trained_betas")
        return cls(betas, zero_terminal_snr=config.get("rescale_betas_zero_snr", False))

    def _bar(self, device: torch.device) -> Tensor:
        if device not in self.on:
            self.on[device] = self.bar.to(device)
        return self.on[device]

    def alpha_sigma(self, t):
        t = _tensor(t)
        bar, level = self._bar(t.device), t.double().floor().clamp(0, self.t_max - 1)
        bar = torch.lerp(bar[level.long()], bar[level.long() + 1], t.double() - level)
        return bar.sqrt().to(t.dtype), (1 - bar).clamp(min=0).sqrt().to(t.dtype)

    def time(self, u):
        return (_tensor(u) * self.t_max).ceil().clamp(min=1)

    def at_angle(self, angle):
        bar, wanted = self._bar(angle.device), angle.double().cos().square()
        level = (torch.searchsorted(-bar, -wanted) - 1).clamp(1, int(self.t_max) - 1)
        share = (bar[level] - wanted) / (bar[level] - bar[level + 1])
        return (level + share.clamp(0, 1)).to(angle.dtype)

    def grid(self, n):
        if n > self.t_max:
            raise ValueError(f"{n} steps are more than the schedule's {self.t_max:.0f} levels")
        return (self.t_max * (1 - torch.arange(n + 1, dtype=torch.float64) / n)).round()

    def conditioning(self, t):
        return _tensor(t) - 1  # diffusers counts from 0

    def config(self):
        return {"betas": self.betas.tolist(), "zero_terminal_snr": self.zero_terminal_snr}


class EDM(Schedule):
    """alpha = 1, sigma = t (Karras et al. 2022, table 1). Quantiles and grid follow sigma^(1/rho), equation 5."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5):
        self.sigma_min, self.sigma_max, self.rho, self.sigma_data = sigma_min, sigma_max, rho, sigma_data
        self.t_max = sigma_max

    def alpha_sigma(self, t):
        t = _tensor(t)
        return torch.ones_like(t), t

    def time(self, u):
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + _tensor(u) * (high - low)) ** self.rho

    def grid(self, n):
        u = 1 - torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
        return torch.cat([self.time(u), torch.zeros(1, dtype=torch.float64)])

    def at_angle(self, angle):
        return angle.tan().abs().clamp(self.sigma_min, self.sigma_max)  # abs: float32 has pi/2 a little beyond it

    def conditioning(self, t):
        return _tensor(t).log() / 4

    def noise_scale(self, t):
        return _tensor(t)

    def config(self):
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "rho": self.rho, "sigma_data": self.sigma_data}


class Flow(Schedule):
    """Rectified flow: x_t = (1 - t) x0 + t eps, t in [0, 1]. Quantiles and grid are shifted towards noise (Esser et al. 2024, eq. 23)."""

    t_max = 1.0

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def alpha_sigma(self, t):
        t = _tensor(t)
        return 1 - t, t

    def time(self, u):
        u = _tensor(u)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def at_angle(self, angle):
        return angle.sin() / (angle.sin() + angle.cos().clamp(min=0))

    def conditioning(self, t):
        return _tensor(t) * 1000

    def config(self):
        return {"shift": self.shift}
