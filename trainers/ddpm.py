"""DDPM pretraining: a teacher of any network of this house, by the plain loss of noise (Ho et al. 2020, "Denoising Diffusion Probabilistic Models").

A network with BatchNorm trains on the statistics of each rank's own microbatch. Stored ones, which sampling and distillation use, are
those of the main rank, and belong to the weights as they are, not to their average.
"""

from dataclasses import dataclass, field, replace

import torch

from models import hub
from models.edm2_unet import unit_norm_weights
from models.schedules import DiscreteVP
from trainers.config import ConfigError, RunConfig, require
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Engine
from trainers.entry import main
from trainers.losses import denoising_loss, progressive_weight
from trainers.optim import OptimConfig
from trainers.trainer import Trainer

WEIGHTS = {"eps": "snr", "v": "snr_plus_one"}  # of x0's squared error, that make it the error of what is predicted
LEAST_ALPHA = 1e-4  # at the last level, where x0 is eps divided by it


@dataclass(frozen=True)
class DdpmConfig(RunConfig):
    """Pretrain a diffusion model with DDPM's loss."""

    network: dict = field(default_factory=lambda: {"type": "SmallUNet"})  # one of models/hub.py's BACKBONES, with its arguments but for the images'
    prediction: str = "eps"  # or "v", whose own error is then the loss (Salimans & Ho 2022, section 4)
    levels: int = 1000  # T, of betas that rise linearly
    beta_start: float = 1e-4
    beta_end: float = 0.02
    label_dropout: float = 0.0  # share of samples trained without their label; above 0, the network can be guided by itself
    optimizer: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    ema: EmaConfig = field(default_factory=EmaConfig)
    sampling_steps: int = 50  # of DDIM

    def check(self, world: int) -> None:
        super().check(world)
        self.micro_batch("optimizer", world, self.optimizer.accumulation)
        self.optimizer.check("optimizer")
        self.ema.check()
        require(self.prediction in WEIGHTS, f"prediction is {self.prediction!r}, and must be one of {', '.join(WEIGHTS)}")
        require(self.levels > 0, f"levels is {self.levels}, and must be above 0")
        require(0 < self.beta_start <= self.beta_end < 1,
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}, and they must rise inside (0, 1)")
        require(0 < self.sampling_steps <= self.levels,
                f"sampling_steps is {self.sampling_steps}, and must lie between 1 and levels {self.levels}")
        alpha = float(self.schedule().alpha_sigma(self.levels)[0])
        require(self.prediction != "eps" or alpha >= LEAST_ALPHA, f"beta_end is {self.beta_end}, which leaves alpha {alpha:.1g} at the last level, "
                f"where eps then says nothing of the image: lower it or levels, or set prediction v")
        require(0 <= self.label_dropout < 1, f"label_dropout is {self.label_dropout}, and must lie in [0, 1)")
        require(self.label_dropout == 0 or self.data.classes > 0,
                f"label_dropout is {self.label_dropout}, and data.classes is 0: there are no labels to drop")
        self.try_network()

    def schedule(self) -> DiscreteVP:
        """Equation 2 and section 4."""
        return DiscreteVP(torch.linspace(self.beta_start, self.beta_end, self.levels, dtype=torch.float64))

    def description(self) -> dict:
        """What `hub.build` makes the network of."""
        images = {"img_resolution": self.data.resolution, "img_channels": self.data.channels, "label_dim": self.data.classes}
        schedule = {"type": "DiscreteVP", **self.schedule().config()}
        return {"backbone": {**self.network, **images}, "schedule": schedule, "prediction": self.prediction, "logvar": None}

    @torch.no_grad()
    def try_network(self) -> None:
        """Raise ConfigError where it cannot be made, or not be called with such images: tried without memory or arithmetic, and without labels."""
        require("type" in self.network, f"network is {self.network}, and has no type: name one of {', '.join(hub.BACKBONES)}")
        unlabelled = replace(self, data=replace(self.data, classes=0)).description()  # one-hot vectors look at their labels
        try:
            with torch.device("meta"):
                x = torch.zeros(2, self.data.channels, self.data.resolution, self.data.resolution)
                found = hub.build(unlabelled)(x, torch.ones(2))
        except (hub.ModelError, ValueError, RuntimeError) as error:
            raise ConfigError(f"network is {self.network}, which cannot be made for data.resolution {self.data.resolution} and "
                              f"data.channels {self.data.channels}: {' '.join(str(error).split())}") from None
        require(found.shape == x.shape, f"network is {self.network}, whose output {tuple(found.shape)} is no image: leave out_channels out")
        null = self.network["type"] != "DiffusersUNet" or self.network.get("null_class", False)
        require(null or not self.label_dropout,
                f"label_dropout is {self.label_dropout}, and this network has no class that means no label: set its null_class")


class DDPM(Trainer):
    method, networks, config_class, default_recipe = "ddpm", ("network",), DdpmConfig, "digits_ddpm"

    def build(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)  # the same weights on every rank
        denoiser = hub.build(config.description()).train()  # with dropout, and the batch's statistics in BatchNorm
        self.description = {**hub.describe(denoiser), "sampler": {"type": "ddim", "steps": config.sampling_steps},
                            "unconditional": config.label_dropout > 0}
        self.schedule = denoiser.schedule
        micro = config.micro_batch("optimizer", self.cluster.world, config.optimizer.accumulation)
        self.network = Engine(self.cluster, "network", denoiser, config.optimizer, micro, unit_norm_weights(denoiser))
        self.ema = ShardedEMA(self.network, config.ema)
        self.engines = {"network": (self.network, self.ema)}

    def step(self, batch):
        metrics = self.network.update(self.loss, batch.split(self.config.optimizer.accumulation))
        self.ema.update(self.images_seen + self.config.loop.batch, self.config.loop.batch)
        return metrics

    def loss(self, batch):
        """|eps - eps_theta(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t)|^2, the mean over pixels (equation 14)."""
        x0, noise = batch.images, batch.noise
        t = self.schedule.time(noise.uniform())  # ~ U{1..T}
        x_t = self.schedule.add_noise(x0, noise.normal(*x0.shape[1:]), t)
        x0_pred = self.network(x_t, t, batch.dropping_labels(self.config.label_dropout))
        weight = progressive_weight(*self.schedule.alpha_sigma(t), WEIGHTS[self.config.prediction])
        return {"loss": denoising_loss(x0_pred, x0, weight).mean()}


if __name__ == "__main__":
    main(DDPM)
