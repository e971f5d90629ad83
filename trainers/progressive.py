"""Progressive distillation: a sampler of many steps becomes one of few, a stage at a time (Salimans & Ho 2022).

In each stage the student learns to do in one DDIM step what its teacher does in K, and then becomes the teacher of the next. A
stage starts from its teacher's weights with a fresh optimizer, whose learning rate falls to zero over the stage, so the last
weights need no average. The first stage's teacher is a pretrained network; guidance can be folded into it (Meng et al. 2023).

OUT/stages/STEPS/    each student, as a model's folder: the next one's teacher, and a result of its own
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models import hub
from models.denoiser import Denoiser, Translated
from models.diffusers_unet import DiffusersUNet
from models.discriminator import StepDiscriminator
from models.edm2_unet import EDM2UNet, unit_norm_weights
from models.sampling import GuidedByCondition, ddim_step, guided
from models.schedules import EDM, DiscreteVP, Schedule, expand
from trainers.config import RunConfig, require
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Engine
from trainers.entry import main
from trainers.ladder import MATCH, PAIRED, Rung, ladder, top
from trainers.losses import (WEIGHTS, denoising_loss, edm_weight, gan_discriminator_loss, gan_generator_loss, progressive_target,
                             progressive_weight)
from trainers.optim import OptimConfig
from trainers.teacher import PretrainConfig, check_teacher, find_teacher, load_teacher
from trainers.trainer import Stage, Trainer

NO_SNR = 1e-6  # of the last time: below it, alpha is taken for zero (the clipped cosine schedule has 2e-9)


@dataclass(frozen=True)
class MatchConfig:
    """A stage before the ladder, in which the student learns the teacher's prediction as it is, in another form."""

    images: int = 0  # 0: no such stage
    prediction: str | None = None  # "v", "x0" or "both"; None: as the teacher
    schedule: str = "teacher"  # "rescaled": the teacher's, with zero terminal SNR; "cosine": alpha = cos(pi t / 2)
    levels: int = 1024  # of the cosine schedule; numbers of steps must divide it


@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator for the last stages, on the features of a copy of the teacher (Lin et al. 2024, "SDXL-Lightning")."""

    steps: int = 0  # stages of so many steps and fewer have it; 0: none
    weight: float = 0.1  # of the student's adversarial loss, beside its distance to the target
    matching_weight: float = 1.0  # of that distance in these stages
    relaxed_images: int = 0  # of a second phase of each such stage, whose discriminator does not see where a step started; 0: none


@dataclass(frozen=True)
class ProgressiveConfig(RunConfig):
    """Distil a teacher progressively."""

    images: int | None = None  # stop when so many were seen; None: at the ladder's end
    stages: dict | list = field(default_factory=lambda: {"from": 64, "to": 1, "images": 20_000})  # trainers/ladder.py
    weight: str | None = None  # of x0's squared error; None: snr_trunc, or EDM's own on its schedule
    guidance: float = 1.0  # of the teacher, folded into the first stage; 1: none
    guidance_range: tuple[float, float] | None = None  # strengths that the student takes as an input, learnt in the match stage
    match: MatchConfig = field(default_factory=MatchConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    student: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, clip=1.0))
    disc: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, betas=(0.0, 0.999)))
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(sigma_rel=()))
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    @property
    def rungs(self) -> list[Rung]:
        return ladder(self.stages, self.student.lr, self.match.images, self.adversarial.steps, self.adversarial.relaxed_images)

    def check(self, world: int) -> None:
        super().check(world)
        self.micro_batch("student", world, self.student.accumulation)
        self.student.check("student")
        self.disc.check("disc")
        require(self.adversarial.steps == 0 or self.disc.accumulation == self.student.accumulation,
                f"disc.accumulation is {self.disc.accumulation}, and student.accumulation {self.student.accumulation}: they must agree")
        for name in ("steps", "weight", "matching_weight", "relaxed_images"):
            value = getattr(self.adversarial, name)
            require(value >= 0, f"adversarial.{name} is {value}, and must not be below 0")
        require(self.student.decay_after_images == 0, "student.decay_after_images is set, and in each stage the learning rate falls to zero: leave it at 0")
        self.ema.check()
        require(self.loop.snapshot_every == 0, f"loop.snapshot_every is {self.loop.snapshot_every}, and averages begin anew in each stage, so that those of "
                                               f"several cannot be combined: leave it at 0")
        require(self.match.images >= 0, f"match.images is {self.match.images}, and must not be below 0")
        for rung in self.rungs:
            given = f"match.images is {rung.images}" if rung.name == MATCH else f"stages has images {rung.images} for the {rung.name} stage"
            require(rung.images % self.loop.batch == 0,
                    f"{given}, which loop.batch {self.loop.batch} does not divide: take {-(-rung.images // self.loop.batch) * self.loop.batch}")
        require(self.weight in (None, *WEIGHTS), f"weight is {self.weight!r}, and must be one of {', '.join(WEIGHTS)}")
        match = self.match
        require(match.prediction in (None, "v", "x0", "both"), f"match.prediction is {match.prediction!r}, and must be v, x0 or both")
        require(match.schedule in ("teacher", "rescaled", "cosine"), f"match.schedule is {match.schedule!r}, and must be teacher, rescaled or cosine")
        require(match.levels > 0, f"match.levels is {match.levels}, and must be above 0")
        require(match.images > 0 or (match.prediction, match.schedule, self.guidance_range) == (None, "teacher", None),
                "match.images is 0, and another prediction, schedule or a range of guidance is learnt in the match stage: set it to its length")
        if self.guidance_range is not None:
            require(self.guidance == 1, f"guidance is {self.guidance}, and guidance_range is {self.guidance_range}: give one of the two")
            require(self.guidance_range[0] < self.guidance_range[1], f"guidance_range is {self.guidance_range}, and must rise")
        require(self.data.classes > 0 or self.guidance == 1 and self.guidance_range is None,
                "guidance is asked for, and data.classes is 0: there is no unconditional form to guide away from")


class Progressive(Trainer):
    method, networks, config_class, default_recipe = "progressive", ("student", "disc"), ProgressiveConfig, "digits_progressive"

    @classmethod
    def prepare(cls, config):
        config = replace(config, teacher=find_teacher(config.teacher, config.pretrain))
        found = check_teacher(config.teacher, config.data)
        check_ladder(config, found)
        return config

    def stages(self) -> list[Stage]:
        """The ladder's, up to the number of images after which this run is to stop."""
        limit = self.config.images or self.rungs[-1].end
        return [Stage(rung.name, min(rung.end, limit), rung.start) for rung in self.rungs if rung.start < limit]

    # -- the two networks

    def build(self) -> None:
        config, self.rungs = self.config, self.config.rungs
        torch.manual_seed(config.seed)  # a strength of guidance that is a new input starts equal on every rank
        student = student_of(hub.load_denoiser(config.teacher), config)
        self.schedule = student.schedule
        self.times = torch.tensor(teacher_times(hub.description(config.teacher), self.schedule, top(config.stages)), dtype=torch.float64)
        self.shape = (config.data.channels, config.data.resolution, config.data.resolution)
        micro = config.micro_batch("student", self.cluster.world, config.student.accumulation)
        student.requires_grad_(True).eval()
        self.student = Engine(self.cluster, "student", student, config.student, micro, unit_norm_weights(student))
        self.ema = ShardedEMA(self.student, config.ema)
        self.engines = {"student": (self.student, self.ema)}
        if config.adversarial.steps:
            disc = StepDiscriminator(hub.load_denoiser(config.teacher)).eval()
            disc.train_what_takes_part(config.data.channels, config.data.resolution, config.data.classes)
            trained = {name for name, p in disc.named_parameters() if p.requires_grad}
            self.disc = Engine(self.cluster, "disc", disc, config.disc, micro, [name for name in unit_norm_weights(disc) if name in trained])
            self.disc_start = self.disc.gather(self.disc.master_shards()) | self.disc.buffers()
            self.engines["disc"] = (self.disc, None)
        self.about = {**hub.describe(student), "unconditional": False}
        if config.guidance_range:
            self.about["guidance"] = list(config.guidance_range)

    def begin(self, stage):
        i = next(i for i, rung in enumerate(self.rungs) if rung.name == stage.name)
        while self.images_seen > self.rungs[i].end:  # a run that went further than it is now asked to: it stays where it is
            i += 1
        self.rung = self.rungs[i]
        times, self.path = steps_of(self.rung, self.times)
        self.path = self.path.to(self.cluster.device)
        self.description = {**self.about, "sampler": {"type": "ddim", "steps": self.rung.steps, "times": times.tolist()}}
        first = self.rung.teacher < 0
        self.teacher = self.first_teacher() if first else load_teacher(self.folder(self.rungs[self.rung.teacher]), self.cluster)
        if i > 0:
            self.student.restart(hub.load_denoiser(self.folder(self.rungs[i - 1])).state_dict())
            self.ema.restart()
        if self.rung.judge:
            self.disc.restart(self.disc_start)

    def first_teacher(self):
        """The pretrained network, on the student's schedule, guided as the student is to learn it."""
        teacher = load_teacher(self.config.teacher, self.cluster)
        if self.rung.name == MATCH:
            teacher = Translated(teacher, self.schedule)
        return GuidedByCondition(teacher) if self.config.guidance_range else guided(teacher, self.config.guidance)

    def end(self, stage):
        if self.images_seen == self.rung.end:
            self.write_model(self.folder(self.rung))

    def folder(self, rung: Rung) -> str:
        return str(self.out / "stages" / rung.folder)

    def learning_rate(self, engine):
        """Straight to zero over the stage, after a warm-up if there is one."""
        seen, warmup = self.images_seen - self.rung.start, self.config.student.warmup_images
        return self.rung.lr * (1 - seen / self.rung.images) * (min(seen / warmup, 1) if warmup else 1)

    # -- the algorithm

    def step(self, batch):
        parts = batch.split(self.config.student.accumulation)
        if self.rung.judge is None:
            metrics = self.student.update(self.loss, parts)
        else:
            self.landings = []
            with self.disc.frozen():
                metrics = self.student.update(self.loss, parts)
            update = self.disc.update(self.disc_loss, self.landings)
            metrics = metrics | {f"disc/{key}": value for key, value in update.items()}
        self.ema.update(self.images_seen - self.rung.start + self.config.loop.batch, self.config.loop.batch)
        return metrics

    def loss(self, batch):
        x0, noise, cond = batch.images, batch.noise, self.condition(batch)
        times = self.draw_times(noise)  # [B, K + 1], from t down to s
        t = times[:, 0]
        x_t = self.schedule.add_noise(x0, noise.normal(*self.shape), t).float()
        with torch.no_grad():
            target = many_steps_in_one(self.teacher, self.schedule, x_t, times, cond)
        x0_student = self.student(x_t, t.float(), cond)
        matching = denoising_loss(x0_student, target, self.weight(t)).mean()
        if self.rung.judge is None:
            return {"loss": matching}

        s, where = times[:, -1], angles(self.schedule, times[:, -1], noise)  # where both landings are judged, at some noise
        real, fake = (ddim_step(self.schedule, x_t, x0, t, s).float() for x0 in (target, x0_student))
        source = {"source": x_t, "source_t": t.float()} if self.rung.judge == PAIRED else {}
        self.landings.append((real, fake.detach(), s, where, noise, cond, source))
        gan = gan_generator_loss(self.verdict(fake, s, where, noise, cond, source)).mean()
        config = self.config.adversarial
        return {"loss": config.matching_weight * matching + config.weight * gan, "matching": matching, "gan": gan}

    def verdict(self, x_s, s, where, noise, cond, source) -> Tensor:
        x_d, d = renoise(self.schedule, x_s, s, where, noise.normal(*self.shape))
        return self.disc(x_d, d, cond, **source)

    def disc_loss(self, landing):
        real, fake, s, where, noise, cond, source = landing
        real, fake = (self.verdict(x_s, s, where, noise, cond, source) for x_s in (real, fake))
        return {"loss": gan_discriminator_loss(real, fake).mean(), "logits_real": real.mean(), "logits_fake": fake.mean()}

    def draw_times(self, noise) -> Tensor:
        """Step i of the student's N, uniform, with the times of the teacher's steps in it. In the match stage, a time alone."""
        if self.rung.name == MATCH:
            return self.schedule.time(1 - noise.uniform().double())[:, None]  # (0, t_max]
        return self.path[(noise.uniform() * self.rung.steps).long()]

    def condition(self, batch):
        """With the strength of guidance, drawn for each sample, where the student takes it as an input."""
        if self.config.guidance_range is None:
            return batch.cond
        low, high = self.config.guidance_range
        return {**batch.cond, "guidance": low + (high - low) * batch.noise.uniform()}

    def weight(self, t: Tensor) -> Tensor:
        alpha, sigma = (c.float() for c in self.schedule.alpha_sigma(t))
        if self.config.weight is None and isinstance(self.schedule, EDM):
            return edm_weight(sigma, self.schedule.sigma_data)  # the plain error of what the network inside predicts
        return progressive_weight(alpha, sigma, self.config.weight or "snr_trunc")


def many_steps_in_one(teacher, schedule, x_t: Tensor, times: Tensor, cond: dict | None) -> Tensor:
    """The x0 from which one DDIM step from t to s lands where the teacher's K steps do.

    x_t [B, C, H, W]; times [B, K + 1], float64, from t down to s. K = 0: the teacher's own x0.
    """
    at = [schedule.alpha_sigma(t) for t in times.unbind(1)]
    z, target = x_t, None
    for k in range(max(times.shape[1] - 1, 1)):
        x0 = teacher(z, times[:, k].float(), cond)
        target = x0 if target is None else progressive_target(target, x0, at[0], at[k], at[k + 1])
        if k + 2 < times.shape[1]:
            z = ddim_step(schedule, z, x0, times[:, k], times[:, k + 1]).float()
    return target


def angles(schedule: Schedule, s: Tensor, noise) -> Tensor:
    """Noise angles [B], uniform between that of time s and half of the way to pure noise."""
    alpha, sigma = schedule.alpha_sigma(s)
    own = torch.atan2(sigma, alpha)
    return own + 0.5 * noise.uniform() * (math.pi / 2 - own)


def renoise(schedule: Schedule, x_s: Tensor, s: Tensor, angle: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """-> (x_d, d): more noise on x_s, up to the time d of this angle. Distributed as data diffused to d, if x_s is as data diffused to s."""
    d = torch.maximum(schedule.at_angle(angle), s)
    (alpha_s, sigma_s), (alpha_d, sigma_d) = schedule.alpha_sigma(s), schedule.alpha_sigma(d)
    kept = alpha_d / alpha_s
    added = (sigma_d**2 - (kept * sigma_s) ** 2).clamp(min=0).sqrt()
    return (expand(kept, x_s) * x_s + expand(added, x_s) * eps).float(), d.float()


def steps_of(rung: Rung, times: Tensor) -> tuple[Tensor, Tensor]:
    """-> (the times of a stage's student [steps + 1], those of its teacher's steps in each of its own [steps, factor + 1])."""
    every = (len(times) - 1) // rung.steps
    hops = every // max(rung.factor, 1) * torch.arange(rung.factor + 1)
    return times[::every], times[torch.arange(0, len(times) - 1, every)[:, None] + hops]


def teacher_times(about: dict, schedule: Schedule, steps: int) -> list[float]:
    """Where the first stage's teacher is called: on the times that it was distilled for, else on its schedule's grid."""
    return about["sampler"].get("times") or schedule.grid(steps).tolist()


def student_of(denoiser: Denoiser, config: ProgressiveConfig) -> Denoiser:
    """The student's network: the teacher's, with the prediction, schedule and inputs that it is to have."""
    schedule, backbone = student_schedule(denoiser.schedule, config.match), denoiser.backbone
    prediction = config.match.prediction or denoiser.prediction
    if config.guidance_range:
        backbone = EDM2UNet(**{**backbone.config, "guided": True})
        backbone.load_state_dict(denoiser.backbone.state_dict(), strict=False)  # what is new has no effect yet
    if prediction == "both" != denoiser.prediction:
        backbone = with_two_outputs(backbone)
    return Denoiser(backbone, schedule, prediction)


def with_two_outputs(backbone: DiffusersUNet) -> DiffusersUNet:
    """The network with its last convolution twice: for x0 and for eps, both of which start as what it predicted."""
    wider = DiffusersUNet(**{**backbone.config, "out_channels": 2 * backbone.config["out_channels"]})
    twice = {name: torch.cat([t, t]) if ".conv_out." in name else t for name, t in backbone.state_dict().items()}
    wider.load_state_dict(twice)
    return wider


def student_schedule(schedule: Schedule, match: MatchConfig) -> Schedule:
    if match.schedule == "cosine":
        return DiscreteVP.cosine(match.levels)
    return DiscreteVP(schedule.betas, zero_terminal_snr=True) if match.schedule == "rescaled" else schedule


def check_ladder(config: ProgressiveConfig, about: dict) -> None:
    """Raise ConfigError where the teacher cannot stand at the ladder's top. about: its description."""
    teacher, sampler, steps = config.teacher, about["sampler"], top(config.stages)
    require(sampler["type"] != "few_step", f"teacher {teacher} is itself a few-step student: give the network it came from")
    distilled = "times" in sampler
    require(not distilled or sampler["steps"] == steps, f"stages starts from {steps} steps, and teacher {teacher} was distilled to "
            f"{sampler['steps']}: it is good for that number alone, so start from {sampler['steps']}")
    require(not distilled or config.match.images == 0, f"match.images is {config.match.images}, and teacher {teacher} was distilled to {sampler['steps']} "
            f"steps: it is good at their times alone, so leave the match stage out")
    require("guidance" not in about, f"teacher {teacher} takes the strength of guidance as an input, and can be distilled further only in the run that made it: "
            f"give the network it came from, with all the stages")
    require(config.match.prediction != "both" or about["backbone"]["type"] == "DiffusersUNet",
            f"match.prediction is both, and a {about['backbone']['type']} cannot be given a second output: take v")
    own, prediction = hub.schedule_of(about), config.match.prediction or about["prediction"]
    require(config.match.schedule == "teacher" and config.match.prediction is None or about["prediction"] != "edm",
            f"match changes the prediction or schedule of teacher {teacher}, an EDM network, which has its own of both: leave them out")
    require(config.match.schedule != "rescaled" or isinstance(own, DiscreteVP), f"match.schedule is rescaled, and the schedule of teacher {teacher} has no betas")
    schedule = student_schedule(own, config.match)
    if isinstance(schedule, DiscreteVP):
        T = int(schedule.t_max)
        require(T % steps == 0, f"stages starts from {steps} steps, which do not divide the schedule's {T} levels: take a divisor of {T}, "
                                f"or match.schedule cosine with match.levels {steps * max(1, round(T / steps))}")
    alpha, sigma = schedule.alpha_sigma(schedule.t_max)
    if not isinstance(schedule, EDM):
        mend = "rescaled" if isinstance(schedule, DiscreteVP) else "cosine"
        require(alpha**2 / sigma**2 <= NO_SNR, f"teacher {teacher} ends at a signal-to-noise ratio of {alpha**2 / sigma**2:.2g}, not 0, so no student can start from "
                f"pure noise: set match.schedule {mend} and match.images")
        require(prediction != "eps", f"teacher {teacher} predicts eps, which at pure noise says nothing of the image: set match.prediction v and match.images")
        require(config.weight != "snr", "weight is snr, which is 0 at pure noise: no student would learn its first step; take snr_trunc")
    unconditional = about.get("unconditional", False)
    require(unconditional or config.guidance == 1 and config.guidance_range is None,
            f"guidance is asked for, and teacher {teacher} was never trained without labels: set guidance to 1, or train it with label_dropout")
    require(config.guidance_range is None or about["backbone"]["type"] == "EDM2UNet",
            f"guidance_range is {config.guidance_range}, and a {about['backbone']['type']} has no input for the strength: give one with guidance")


if __name__ == "__main__":
    main(Progressive)
