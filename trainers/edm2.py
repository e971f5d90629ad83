"""EDM2 pretraining: the teacher (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models")."""

from dataclasses import asdict, dataclass, field

import torch

from models import hub
from models.denoiser import Denoiser, ScoreModel
from models.edm2_unet import EDM2UNet, LogVar, unit_norm_weights
from models.schedules import EDM
from trainers.config import RunConfig, require
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Engine
from trainers.entry import main
from trainers.losses import edm2_loss
from trainers.optim import OptimConfig
from trainers.trainer import Trainer


@dataclass(frozen=True)
class NetworkConfig:
    """The U-Net. Defaults are those of the published S model."""

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256
    dropout: float = 0.0


@dataclass(frozen=True)
class Edm2Config(RunConfig):
    """Pretrain a diffusion model with EDM2."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    sigma_data: float = 0.5  # standard deviation of the data
    P_mean: float = -0.4  # ln sigma ~ N(P_mean, P_std^2)
    P_std: float = 1.0
    label_dropout: float = 0.0  # share of samples trained without their label; above 0, the network can be guided by itself
    optimizer: OptimConfig = field(default_factory=lambda: OptimConfig(lr=0.01, betas=(0.9, 0.99), warmup_images=10_000_000, decay_after_images=143_360_000))
    ema: EmaConfig = field(default_factory=EmaConfig)
    sampling_steps: int = 32

    def check(self, world: int) -> None:
        super().check(world)
        self.micro_batch("optimizer", world, self.optimizer.accumulation)
        self.optimizer.check("optimizer")
        self.ema.check()
        for name in ("sigma_data", "P_std", "sampling_steps"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, and must be above 0")
        require(0 <= self.label_dropout < 1, f"label_dropout is {self.label_dropout}, and must lie in [0, 1)")
        require(self.data.resolution & (self.data.resolution - 1) == 0, f"data.resolution is {self.data.resolution}, and must be a power of two")
        smallest = self.data.resolution >> (len(self.network.channel_mult) - 1)
        require(smallest >= 1, f"network.channel_mult has {len(self.network.channel_mult)} levels, too many for resolution {self.data.resolution}")
        for level, mult in enumerate(self.network.channel_mult):
            width, resolution = self.network.model_channels * mult, self.data.resolution >> level
            attends = resolution in self.network.attn_resolutions or resolution == smallest
            require(not attends or width >= self.network.channels_per_head,
                    f"network.channels_per_head is {self.network.channels_per_head}, more than the {width} channels at resolution {resolution}, "
                    f"whose attention would vanish: set it to {width} or less")


class EDM2(Trainer):
    method, networks, config_class, default_recipe = "edm2", ("network",), Edm2Config, "digits_edm2"

    def build(self) -> None:
        config, data = self.config, self.config.data
        torch.manual_seed(config.seed)  # the same weights on every rank
        unet = EDM2UNet(data.resolution, data.channels, data.classes, **asdict(config.network))
        denoiser = Denoiser(unet, EDM(sigma_data=config.sigma_data), "edm", LogVar())
        self.description = {**hub.describe(denoiser), "sampler": {"type": "heun", "steps": config.sampling_steps},
                            "unconditional": config.label_dropout > 0}
        self.schedule = denoiser.schedule
        model = ScoreModel(denoiser)
        micro = config.micro_batch("optimizer", self.cluster.world, config.optimizer.accumulation)
        self.network = Engine(self.cluster, "network", model, config.optimizer, micro, unit_norm_weights(model))
        self.ema = ShardedEMA(self.network, config.ema)
        self.engines = {"network": (self.network, self.ema)}

    def step(self, batch):
        metrics = self.network.update(self.loss, batch.split(self.config.optimizer.accumulation))
        self.ema.update(self.images_seen + self.config.loop.batch, self.config.loop.batch)
        return metrics

    def loss(self, batch):
        x0 = batch.images
        sigma = (self.config.P_mean + self.config.P_std * batch.noise.normal()).exp()
        x_t = self.schedule.add_noise(x0, batch.noise.normal(*x0.shape[1:]), sigma)
        score = self.network(x_t, sigma, batch.dropping_labels(self.config.label_dropout))
        loss = edm2_loss(score.x0, x0, sigma, score.logvar, self.schedule.sigma_data).mean()
        return {"loss": loss * x0[0].numel(), "edm2_loss": loss}  # the paper's sum over pixels: Adam's eps sees the same gradients


if __name__ == "__main__":
    main(EDM2)
