"""Optimizers and learning rates. A learning rate is a function of images seen, never of steps."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from trainers.config import require


@dataclass(frozen=True)
class OptimConfig:
    """One network's optimizer. AdamW; weight_decay 0 makes it Adam."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0  # bound on the gradient's global norm; 0: none
    accumulation: int = 1  # microbatches that make one update of this network
    warmup_images: int = 0  # linear rise from 0
    decay_after_images: int = 0  # then 1 / sqrt(images); 0: constant
    disc_lr_scale: float = 1.0  # the discriminator head's learning rate, in units of lr

    def check(self, name: str) -> None:
        """Raise ConfigError for what cannot work; `name` is this section's."""
        for field in ("lr", "eps", "disc_lr_scale"):
            require(getattr(self, field) > 0, f"{name}.{field} is {getattr(self, field)}, and must be above 0")
        for field in ("weight_decay", "clip", "warmup_images", "decay_after_images"):
            require(getattr(self, field) >= 0, f"{name}.{field} is {getattr(self, field)}, and must not be below 0")
        require(all(0 <= beta < 1 for beta in self.betas), f"{name}.betas is {self.betas}, and both must lie in [0, 1)")


def inverse_sqrt_lr(images: int, batch: int, ref_lr: float, ref_batches: float, rampup_images: float) -> float:
    """EDM2's schedule: linear ramp, constant, then 1 / sqrt(images) after ref_batches batches (Karras et al. 2024, eq. 67).

    `images` are those seen before the step. ref_batches or rampup_images 0 turns that part off.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(images / (ref_batches * batch), 1))
    if rampup_images > 0:
        lr *= min(images / rampup_images, 1)
    return lr


def learning_rate(config: OptimConfig, images: int) -> float:
    """The learning rate of the step that starts when `images` were seen."""
    return inverse_sqrt_lr(images, 1, config.lr, config.decay_after_images, config.warmup_images)


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW over the trainable parameters. Those of a discriminator head (`disc.`) form a group with its own rate.

    Fused, because its kernels can refuse a step on the device (`found_inf`), without asking the host.
    """
    groups = {1.0: [], config.disc_lr_scale: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[config.disc_lr_scale if name.startswith("disc.") else 1.0].append(parameter)
    groups = [{"params": params, "lr_scale": scale} for scale, params in groups.items() if params]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
