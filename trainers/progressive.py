"""Progressive distillation: a sampler of many steps becomes one of few, a stage at a time (Salimans & Ho 2022).

In each stage the student learns to do in one DDIM step what its teacher does in K, and then becomes the teacher of the next. A
stage starts from its teacher's weights with a fresh optimizer, whose learning rate falls to zero over the stage, so the last
weights need no average. The first stage's teacher is a pretrained network; guidance can be folded into it (Meng et al. 2023).

OUT/stages/STEPS/    each student, as a model's folder: the next one's teacher, and a result of its own
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models import hub
from models.denoiser import Denoiser, Translated
from models.edm2_unet import EDM2UNet, unit_norm_weights
from models.sampling import GuidedByCondition, ddim_step, guided
from models.schedules import EDM, DiscreteVP, Schedule
from trainers.config import RunConfig, require
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Engine
from trainers.ladder import MATCH, Rung, ladder, top
from trainers.losses import WEIGHTS, denoising_loss, edm_weight, progressive_target, progressive_weight
from trainers.optim import OptimConfig
from trainers.teacher import PretrainConfig, check_teacher, find_teacher, load_teacher
from trainers.trainer import Stage, Trainer, main

NO_SNR = 1e-6  # of the last time: below it, alpha is taken for zero (the clipped cosine schedule has 2e-9)


@dataclass(frozen=True)
class MatchConfig:
    """A stage before the ladder, in which the student learns the teacher's prediction as it is, in another form."""

    images: int = 0  # 0: no such stage
    prediction: str | None = None  # "v" or "x0"; None: as the teacher
    schedule: str = "teacher"  # "rescaled": the teacher's, with zero terminal SNR; "cosine": alpha = cos(pi t / 2)
    levels: int = 1024  # of the cosine schedule; numbers of steps must divide it


@dataclass(frozen=True)
class ProgressiveConfig(RunConfig):
    """Distil a teacher progressively."""

    images: int | None = None  # stop when so many were seen; None: at the ladder's end
    stages: dict | list = field(default_factory=lambda: {"from": 64, "to": 1, "images": 20_000})  # trainers/ladder.py
    weight: str | None = None  # of x0's squared error; None: snr_trunc, or EDM's own on its schedule
    guidance: float = 1.0  # of the teacher, folded into the first stage; 1: none
    guidance_range: tuple[float, float] | None = None  # strengths that the student takes as an input, learnt in the match stage
    match: MatchConfig = field(default_factory=MatchConfig)
    student: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, clip=1.0))
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(sigma_rel=()))
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    @property
    def rungs(self) -> list[Rung]:
        return ladder(self.stages, self.student.lr, self.match.images)

    def check(self, world: int) -> None:
        super().check(world)
        self.micro_batch("student", world, self.student.accumulation)
        self.student.check("student")
        require(self.student.decay_after_images == 0, "student.decay_after_images is set, and in each stage the learning rate falls to zero: leave it at 0")
        self.ema.check()
        for rung in self.rungs:
            require(rung.images % self.loop.batch == 0, f"stages has images {rung.images} for the {rung.name} stage, which loop.batch {self.loop.batch} "
                    f"does not divide: take {-(-rung.images // self.loop.batch) * self.loop.batch}")
        require(self.weight in (None, *WEIGHTS), f"weight is {self.weight!r}, and must be one of {', '.join(WEIGHTS)}")
        match = self.match
        require(match.prediction in (None, "v", "x0"), f"match.prediction is {match.prediction!r}, and must be v or x0")
        require(match.schedule in ("teacher", "rescaled", "cosine"), f"match.schedule is {match.schedule!r}, and must be teacher, rescaled or cosine")
        require(match.images > 0 or (match.prediction, match.schedule, self.guidance_range) == (None, "teacher", None),
                "match.images is 0, and another prediction, schedule or a range of guidance is learnt in the match stage: set it to its length")
        if self.guidance_range is not None:
            require(self.guidance == 1, f"guidance is {self.guidance}, and guidance_range is {self.guidance_range}: give one of the two")
            require(self.guidance_range[0] < self.guidance_range[1], f"guidance_range is {self.guidance_range}, and must rise")


class Progressive(Trainer):
    method, networks, config_class, default_recipe = "progressive", ("student",), ProgressiveConfig, "digits_progressive"

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
        self.about = {**hub.describe(student), "unconditional": False}
        if config.guidance_range:
            self.about["guidance"] = list(config.guidance_range)

    def begin(self, stage):
        i = next(i for i, rung in enumerate(self.rungs) if rung.name == stage.name)
        self.rung = self.rungs[i]
        times, self.path = steps_of(self.rung, self.times)
        self.path = self.path.to(self.cluster.device)
        self.description = {**self.about, "sampler": {"type": "ddim", "steps": self.rung.steps, "times": times.tolist()}}
        if i == 0:
            self.teacher = self.first_teacher()
        else:
            parent = self.folder(self.rungs[i - 1])
            self.teacher = load_teacher(parent, self.cluster)
            self.student.restart(hub.load_denoiser(parent).state_dict())
            self.ema.restart()

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
        return str(self.out / "stages" / (MATCH if rung.name == MATCH else f"{rung.steps:05d}"))

    def learning_rate(self, engine):
        """Straight to zero over the stage, after a warm-up if there is one."""
        seen, warmup = self.images_seen - self.rung.start, self.config.student.warmup_images
        return self.rung.lr * (1 - seen / self.rung.images) * (min(seen / warmup, 1) if warmup else 1)

    # -- the algorithm

    def step(self, batch):
        metrics = self.student.update(self.loss, batch.split(self.config.student.accumulation))
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
        return {"loss": denoising_loss(x0_student, target, self.weight(t)).mean()}

    def draw_times(self, noise) -> Tensor:
        """Step i of the student's N, uniform, with the times of the teacher's steps in it. In the match stage, a time alone."""
        if self.rung.name == MATCH:
            return self.schedule.time(noise.uniform().double())[:, None]
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
    if config.guidance_range:
        backbone = EDM2UNet(**{**backbone.config, "guided": True})
        backbone.load_state_dict(denoiser.backbone.state_dict(), strict=False)  # what is new has no effect yet
    return Denoiser(backbone, schedule, config.match.prediction or denoiser.prediction)


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
        require(alpha**2 / sigma**2 <= NO_SNR, f"teacher {teacher} ends at a signal-to-noise ratio of {alpha**2 / sigma**2:.2g}, not 0, so no student can start from "
                f"pure noise: set match.schedule rescaled and match.images")
        require(prediction != "eps", f"teacher {teacher} predicts eps, which at pure noise says nothing of the image: set match.prediction v and match.images")
        require(not (config.weight == "snr" and config.rungs[-1].steps == 1), "weight is snr, which is 0 at pure noise: the one-step student "
                "would learn nothing; take snr_trunc")
    unconditional = about.get("unconditional", False)
    require(unconditional or config.guidance == 1 and config.guidance_range is None,
            f"guidance is asked for, and teacher {teacher} was never trained without labels: set guidance to 1, or train it with label_dropout")
    require(config.guidance_range is None or about["backbone"]["type"] == "EDM2UNet",
            f"guidance_range is {config.guidance_range}, and a {about['backbone']['type']} has no input for the strength: give one with guidance")


if __name__ == "__main__":
    main(Progressive)
