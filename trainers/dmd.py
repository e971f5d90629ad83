"""Distribution matching distillation: a many-step teacher becomes a generator of one to eight steps.

DMD (Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation") and DMD2 (Yin et al. 2024, "Improved
Distribution Matching Distillation for Fast Image Synthesis"). Three networks under one Accelerator: the frozen teacher knows
the score of real images; the fake score learns that of the generator's; the generator descends their difference. With LoRA the two are
adapters on the teacher, which is held once (models/lora.py).

An iteration trains the fake score once, on images that the generator has just made. In every `fake_updates`-th iteration the
generator is trained first, and the same images serve both. One iteration counts `loop.batch` images.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from models import hub
from models.conditioning import concatenate
from models.denoiser import ScoreModel
from models.discriminator import DiscriminatorHead
from models.edm2_unet import unit_norm_weights
from models.lora import LoraBank, LoraRole, check_network
from models.noise import Noise
from models.sampling import guided
from models.schedules import EDM
from trainers.config import ConfigError, RunConfig, require
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Engine
from trainers.entry import main
from trainers.losses import (denoising_loss, dmd_gradient, dmd_loss, edm2_loss, edm_weight, gan_discriminator_loss, gan_generator_loss,
                             regression_loss)
from trainers.optim import OptimConfig
from trainers.pairs import Pairs, weights_hash
from trainers.perceptual import Lpips
from trainers.teacher import PretrainConfig, check_teacher, find_teacher, load_teacher
from trainers.trainer import Trainer

FAKE_STREAM, DEPTH_STREAM = 1, 2  # random numbers of the fake score's update, and of the rollout's depth


@dataclass(frozen=True)
class RegressionConfig:
    """DMD v1: also match the teacher's own image for the same noise, on stored pairs."""

    weight: float = 0.0  # 0: none; the paper's lambda is 0.25
    pairs: str | None = None  # a folder that `fewstep pairs` wrote
    distance: str = "lpips"  # "lpips", "huber" or "l2"
    backbone: str = "vgg"  # of LPIPS: "vgg" or "alex"
    weights: str | None = None  # its weights; None: torch's hub cache, or the hub


@dataclass(frozen=True)
class LoraConfig:
    """Train adapters on the frozen teacher instead of copies of it."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float | None = None  # an adapter's part is scaled by alpha / rank; None: the rank
    targets: tuple[str, ...] = ("dmd2",)  # names that linear and convolution layers end in, or presets: dmd2, attention
    networks: tuple[str, ...] = ("generator", "fake_score")  # one that is not named is trained in full, on a copy of its own
    checkpointing: bool = False  # keep less for the backward pass of adapters, and compute it again

    @property
    def adapted(self) -> tuple[str, ...]:
        return self.networks if self.rank else ()

    def check(self) -> None:
        """Raise ConfigError for what cannot work on any teacher."""
        require(self.rank >= 0, f"lora.rank is {self.rank}, and must not be below 0")
        changed = next((f for f in ("alpha", "targets", "networks", "checkpointing") if getattr(self, f) != getattr(LoraConfig, f)), None)
        require(self.rank > 0 or changed is None, f"lora.{changed} is given, and lora.rank is 0, which means no LoRA: give a rank, such as 64")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha is {self.alpha}, and must be above 0")
        fits = self.networks and len(set(self.networks)) == len(self.networks) and set(self.networks) <= set(DMD.networks)
        require(fits, f"lora.networks is {list(self.networks)}, and must name {' or '.join(DMD.networks)}, or both")


@dataclass(frozen=True)
class DmdConfig(RunConfig):
    """Distil a teacher with DMD or DMD2."""

    timesteps: tuple[float, ...] = ()  # where the generator is called, from noise to data, in the schedule's time; (): once, at t_max
    fake_updates: int = 5  # optimizer steps of the fake score for each of the generator's
    guidance: float = 1.0  # of the teacher; 1: none
    matching_weight: float = 1.0  # of the distribution-matching loss
    gan_weight: float = 0.0  # of the generator's adversarial loss; 0: no discriminator, and no real image is used
    disc_weight: float = 0.01  # of the discriminator's loss in the fake score's update
    score_range: tuple[float, float] = (0.02, 0.98)  # quantiles of time at which the scores are compared
    fake_time: str = "uniform"  # where the fake score is trained: "uniform" in quantiles, or "lognormal" in sigma
    P_mean: float = -0.4  # of ln sigma, for fake_time lognormal
    P_std: float = 1.2
    generator: OptimConfig = field(default_factory=OptimConfig)
    fake_score: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def check(self, world: int) -> None:
        super().check(world)
        self.micro_batch("generator", world, self.generator.accumulation)
        self.micro_batch("fake_score", world, self.fake_score.accumulation)
        self.generator.check("generator")
        self.fake_score.check("fake_score")
        self.lora.check()
        self.ema.check()
        require(self.fake_updates >= 1, f"fake_updates is {self.fake_updates}, and must be 1 or more")
        require(0 <= self.score_range[0] < self.score_range[1] <= 1, f"score_range is {self.score_range}, and must be two rising numbers in [0, 1]")
        require(self.fake_time in ("uniform", "lognormal"), f"fake_time is {self.fake_time!r}, and must be uniform or lognormal")
        require(list(self.timesteps) == sorted(self.timesteps, reverse=True), f"timesteps is {self.timesteps}, and must fall from noise to data")
        require(self.guidance == 1 or self.data.classes > 0, f"guidance is {self.guidance}, and data.classes is 0: there is no unconditional form to guide away from")
        distances = ("lpips", "huber", "l2")
        require(self.regression.distance in distances, f"regression.distance is {self.regression.distance!r}, and must be one of {', '.join(distances)}")
        require(not self.regression.weight or self.regression.pairs is not None,
                f"regression.weight is {self.regression.weight}, and regression.pairs names no folder: make pairs with `fewstep pairs`")


class DMD(Trainer):
    method, networks, config_class, default_recipe = "dmd", ("generator", "fake_score"), DmdConfig, "digits_dmd"

    @classmethod
    def prepare(cls, config):
        config = replace(config, teacher=find_teacher(config.teacher, config.pretrain))
        found = check_teacher(config.teacher, config.data)
        require(found["sampler"]["type"] != "few_step", f"teacher {config.teacher} is itself a few-step student: give the network it came from")
        require(config.guidance == 1 or found.get("unconditional", False),
                f"guidance is {config.guidance}, and teacher {config.teacher} was never trained without labels: set guidance to 1, or train it with label_dropout")
        low, high = 0, hub.schedule_of(found).t_max
        require(all(low < t <= high for t in config.timesteps), f"timesteps is {config.timesteps}, and the teacher's schedule runs from {low} to {high:g}")
        require(config.fake_time == "uniform" or found["schedule"]["type"] == "EDM", "fake_time lognormal is a distribution of the EDM schedule's sigma: use uniform")
        if config.lora.rank:
            check_lora(config, found)
        if config.regression.weight:
            about = Pairs(config.regression.pairs, config.seed).about
            require(about["weights"] == weights_hash(config.teacher), f"regression.pairs {config.regression.pairs} were made by another teacher than {config.teacher}")
        return config

    # -- the three networks

    def build(self) -> None:
        config, adapted = self.config, self.config.lora.adapted
        torch.manual_seed(config.seed)  # the discriminator head and adapters start equal on every rank
        self.teacher = load_teacher(config.teacher, self.cluster)
        start = None if set(adapted) == set(self.networks) else hub.load_denoiser(config.teacher)
        bank = self._bank() if adapted else None
        self.schedule = self.teacher.schedule
        self.shape = (config.data.channels, config.data.resolution, config.data.resolution)
        self.timesteps = config.timesteps or (self.schedule.t_max,)
        self.guided_teacher = guided(self.teacher, config.guidance)

        if "generator" in adapted:
            student = LoraRole(bank, "generator", self.teacher)
        else:
            student = deepcopy(start)
            student.logvar = None  # only a denoising loss trains it
        self.generator = self._engine("generator", student)
        self.ema = ShardedEMA(self.generator, config.ema)
        disc = None
        if config.gan_weight:
            disc = DiscriminatorHead(self.teacher.backbone.feature_channels, self.teacher.backbone.feature_resolution)
        score = LoraRole(bank, "fake_score", ScoreModel(self.teacher, disc)) if "fake_score" in adapted else ScoreModel(start, disc)
        self.fake_score = self._engine("fake_score", score)
        self.engines = {"generator": (self.generator, self.ema), "fake_score": (self.fake_score, None)}
        self.description = {**hub.describe(self.teacher), "logvar": None, "sampler": {"type": "few_step", "timesteps": list(self.timesteps)}}
        if "generator" in adapted:
            base = Path(config.teacher)
            self.description["lora"] = {**bank.config, "base": str(base.resolve()) if base.exists() else config.teacher}
        if config.regression.weight:
            self.pairs = Pairs(config.regression.pairs, config.seed)
            distance = config.regression.distance
            self.distance = Lpips(config.regression.backbone, config.regression.weights).to(self.cluster.device) if distance == "lpips" else distance

    def _bank(self) -> LoraBank:
        lora = self.config.lora
        require(not (lora.checkpointing and self.cluster.compiler),
                "lora.checkpointing is true, and what selects an adapter anew cannot be compiled: set it to false, or launch with dynamo_backend no")
        bank = LoraBank(self.teacher, lora.adapted, lora.rank, lora.alpha or lora.rank, lora.targets)
        if lora.checkpointing:
            bank.enable_checkpointing()
        return bank

    def _engine(self, name: str, module) -> Engine:
        """In eval mode, like the teacher: dropout in any of the three would be noise in the difference of scores."""
        module.requires_grad_(True).eval()
        config = getattr(self.config, name)
        micro = self.config.micro_batch(name, self.cluster.world, config.accumulation)
        return Engine(self.cluster, name, module, config, micro, unit_norm_weights(module))

    # -- the algorithm

    def step(self, batch):
        iteration = self.images_seen // self.config.loop.batch
        depth = self.depth()
        metrics = {}
        if iteration % self.config.fake_updates == 0:
            self.made = []
            with self.fake_score.frozen():
                update = self.generator.update(lambda b: self.generator_loss(b, depth), batch.split(self.config.generator.accumulation))
            x_gen = torch.cat(self.made)
            self.ema.update(self.images_seen + self.config.loop.batch, self.config.loop.batch * min(iteration + 1, self.config.fake_updates))
            metrics |= {f"generator/{k}": v for k, v in update.items()}
        else:
            with torch.no_grad():
                x_gen = self.generate(batch, depth)
        fake = replace(batch, noise=batch.noise.fork(FAKE_STREAM))
        parts = self.config.fake_score.accumulation
        update = self.fake_score.update(self.fake_loss, list(zip(fake.split(parts), x_gen.chunk(parts))))
        return metrics | {f"fake_score/{k}": v for k, v in update.items()}

    def depth(self) -> int:
        """Which of the generator's steps is trained in this iteration: uniform, and the same on every rank."""
        u = Noise(self.config.seed, DEPTH_STREAM, [self.images_seen]).uniform()
        return int(u * len(self.timesteps))

    def generate(self, batch, depth: int):
        """The generator's x0 at step `depth`, from its own output of the steps before (backward simulation; DMD2, section 4.5)."""
        times = [batch.images.new_full((len(batch.images),), t) for t in self.timesteps]
        x_t = batch.noise.normal(*self.shape) * self.schedule.noise_scale(self.timesteps[0]).float()
        with torch.no_grad():
            for t, s in zip(times[:depth], times[1:]):
                x_t = self.schedule.add_noise(self.generator(x_t, t, batch.cond), batch.noise.normal(*self.shape), s)
        return self.generator(x_t, times[depth], batch.cond)  # gradient through this call alone

    def generator_loss(self, batch, depth: int):
        config, noise, cond = self.config, batch.noise, batch.cond
        x_gen = self.generate(batch, depth)
        self.made.append(x_gen.detach())

        low, high = config.score_range
        t = self.schedule.time(low + (high - low) * noise.uniform())
        with torch.no_grad():
            x_t = self.schedule.add_noise(x_gen, noise.normal(*self.shape), t)
            x0_real = self.guided_teacher(x_t, t, cond)
            x0_fake = self.fake_score(x_t, t, cond).x0
        gradient = dmd_gradient(x_gen, x0_real, x0_fake)  # DMD, equations 7 and 8
        losses = {"matching": config.matching_weight * dmd_loss(x_gen, gradient).mean()}

        if config.gan_weight:  # DMD2, equation 4: through the fake score's encoder, at any noise level
            t = self.schedule.time(noise.uniform())
            x_t = self.schedule.add_noise(x_gen, noise.normal(*self.shape), t)
            logits = self.fake_score(x_t, t, cond, denoise=False, logits=True).logits
            losses["gan"] = config.gan_weight * gan_generator_loss(logits).mean()
        if config.regression.weight:  # DMD, equation 9
            losses["regression"] = config.regression.weight * self.regression(batch)
        return {"loss": sum(losses.values()), "score_gap": gradient.abs().mean(), **losses}

    def regression(self, batch):
        z, y, cond = self.pairs.take(batch.noise.samples, self.cluster.device)
        t = z.new_full((len(z),), self.timesteps[0])
        x_gen = self.generator(z * self.schedule.noise_scale(self.timesteps[0]).float(), t, cond)
        return regression_loss(x_gen, y, self.distance).mean()

    def fake_loss(self, microbatch):
        """Denoise the generator's images (DMD, equation 6) and tell them from real ones."""
        batch, x_gen = microbatch
        noise, cond = batch.noise, batch.cond
        t = self.fake_times(noise)
        x_t = self.schedule.add_noise(x_gen, noise.normal(*self.shape), t)
        losses = {"denoising": self.denoising(self.fake_score(x_t, t, cond), x_gen, t).mean()}

        if self.config.gan_weight:  # real and fake in one batch, each with its own noise
            t = self.schedule.time(torch.cat([noise.uniform(), noise.uniform()]))
            eps = torch.cat([noise.normal(*self.shape), noise.normal(*self.shape)])
            x_t = self.schedule.add_noise(torch.cat([batch.images, x_gen]), eps, t)
            both = None if cond is None else concatenate(cond, cond)
            real, fake = self.fake_score(x_t, t, both, denoise=False, logits=True).logits.chunk(2)
            losses["disc"] = self.config.disc_weight * gan_discriminator_loss(real, fake).mean()
            return {"loss": sum(losses.values()), **losses, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {"loss": sum(losses.values()), **losses}

    def fake_times(self, noise):
        if self.config.fake_time == "lognormal":
            return (self.config.P_mean + self.config.P_std * noise.normal()).exp()
        return self.schedule.time(noise.uniform())

    def denoising(self, score, x0, t):
        """The fake score's loss [B]: with learned variance where the network has one, else EDM's weight, else the error of eps."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        if score.logvar is not None:
            return edm2_loss(score.x0, x0, sigma, score.logvar, self.schedule.sigma_data)
        weight = edm_weight(sigma, self.schedule.sigma_data) if isinstance(self.schedule, EDM) else (alpha / sigma) ** 2
        return denoising_loss(score.x0, x0, weight)


def check_lora(config: DmdConfig, teacher: dict) -> None:
    """Raise ConfigError where the teacher, of this description, cannot have such adapters."""
    with torch.device("meta"):
        backbone = hub.build(teacher).backbone
    try:
        check_network(backbone, config.lora.targets, config.lora.checkpointing)
    except ValueError as error:
        raise ConfigError(f"teacher {config.teacher} cannot have such a LoRA: {error}") from None


if __name__ == "__main__":
    main(DMD)
