"""The loop that every method shares. It never asks which method it runs.

A method is a subclass: `build` makes its engines, `step` is its algorithm. Progress is counted in images seen.
"""

import signal
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import hub
from models.denoiser import Denoiser
from trainers import checkpoint, posthoc
from trainers.config import RunConfig, write_config
from trainers.data import Batch, ImageSet, StreamedSet, batches
from trainers.ema import ShardedEMA
from trainers.engine import Cluster, Engine
from trainers.evaluation import Evaluation
from trainers.logs import Meter, RunLog
from trainers.optim import learning_rate


class TrainingError(Exception):
    """Training cannot go on. The message says where the last good checkpoint is."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training: from `start` until `images` were seen."""

    name: str
    images: int
    start: int = 0


class Trainer(ABC):
    """One run. A subclass sets `method`, `networks`, `config_class` and `default_recipe`.

    `build` fills `engines` {name: (engine, its average or None)} and sets `result`, the name of the one whose average is the
    run's result, and `description`, what `hub.build` makes the result of, with its "sampler".
    """

    method: str
    networks: tuple[str, ...]
    config_class: type[RunConfig]
    default_recipe: str

    def __init__(self, config: RunConfig, cluster: Cluster, images: ImageSet | StreamedSet):
        self.config, self.cluster, self.images = config, cluster, images
        self.out = Path(config.out)
        self.engines: dict[str, tuple[Engine, ShardedEMA | None]] = {}
        self.result: str = self.networks[0]
        self.description: dict = {}
        self.images_seen = 0
        self.meter, self.asked_to_stop = Meter(), False

    @classmethod
    def prepare(cls, config: RunConfig) -> RunConfig:
        """What a method does before any network is built and any process group exists. Returns the config to run."""
        return config

    @abstractmethod
    def build(self) -> None:
        """Make the networks, their engines and averages."""

    @abstractmethod
    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the algorithm on this rank's part of the batch. Returns what to log, as 0-d tensors."""

    def stages(self) -> list[Stage]:
        return [Stage(self.method, self.config.images)]

    def begin(self, stage: Stage) -> None:
        """What a method does as it enters a stage; if training goes on inside it, the engines' state is loaded afterwards."""

    def end(self, stage: Stage) -> None:
        """What a method does when a stage's last image was seen, before the checkpoint that says so."""

    def learning_rate(self, engine: Engine) -> float:
        """Of the step that is next."""
        return learning_rate(engine.config, self.images_seen)

    # -- the loop

    def fit(self) -> None:
        """Train to the end, from the latest good checkpoint if there is one, and write the result."""
        self.evaluation = Evaluation(self.config, self.cluster, self.images) if self.config.loop.eval_every else None
        self.build()
        stages = self._resume(self.stages())
        if self.cluster.is_main:
            write_config(self.config)
        self.log = RunLog(self.out, self.cluster, stages[-1].images, self.images_seen)
        if self.images_seen:
            self.log.say(f"resuming {self.out} at {self.images_seen} images")
        with self._listening():
            for i, stage in enumerate(stages):
                if i:
                    self.begin(stage)
                self.log.enter(stage.name)
                self._run(stage)
        self.export()
        self.log.close()

    def _run(self, stage: Stage) -> None:
        loop = self.config.loop
        stream = batches(self.images, self.config.data, self.config.seed, loop.batch, self.images_seen,
                         self.cluster.rank, self.cluster.world, self.cluster.device)
        clock, counted = time.time(), self.images_seen
        while self.images_seen < stage.images:
            for engine, _ in self.engines.values():
                engine.set_lr(self.learning_rate(engine))
            batch = next(stream)
            torch.manual_seed(hash((self.config.seed, self.cluster.rank, self.images_seen)))  # dropout too goes on where it stopped
            self.meter.add(self.step(batch))
            self.images_seen += loop.batch
            self.log.progress(self.images_seen)
            done = self.images_seen >= stage.images
            if done:
                self.end(stage)  # before the report, which saves and leaves when a signal came
            if done or self._due(loop.log_every):
                self._report((self.images_seen - counted) / (time.time() - clock))
                clock, counted = time.time(), self.images_seen
            if self._due(loop.eval_every) or done and loop.eval_every:
                self.log.write(self.images_seen, {"fd": self.evaluation(self.average(), self.description, self.images_seen)})
                clock, counted = time.time(), self.images_seen
            if self._due(loop.snapshot_every):
                posthoc.write(self.out, self.images_seen, self.description, self.engines[self.result][1], self.cluster)
            if done or self._due(loop.save_every):
                self.save()

    def _due(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` images."""
        return bool(every) and self.images_seen // every > (self.images_seen - self.config.loop.batch) // every

    def _report(self, images_per_second: float) -> None:
        """Log, and look at what is only looked at now: refused updates and signals. The one place that waits for the device."""
        values, worst = self.meter.read(self.cluster), {}
        for name, (engine, _) in self.engines.items():
            _, worst[name], refused = engine.refusals.tolist()
            values |= {f"{name}/lr": self.learning_rate(engine), f"{name}/refused": refused}
        self.log.write(self.images_seen, {**values, "images_per_second": images_per_second})
        for name, in_a_row in worst.items():
            if in_a_row >= self.config.loop.max_refused:
                raise TrainingError(f"{in_a_row:.0f} updates of {name} in a row had a loss or gradient that is not finite, and were refused: "
                                    f"stopped at {self.images_seen} images; {self._last_checkpoint()}")
        if self.cluster.any(self.asked_to_stop):
            self.save()
            self.log.close()
            if self.config.loop.stopped and self.cluster.is_main:
                Path(self.config.loop.stopped).touch()
            raise KeyboardInterrupt

    def _last_checkpoint(self) -> str:
        folder = checkpoint.latest_good(self.out / "checkpoints")
        return f"the last good checkpoint is {folder}" if folder else "there is no checkpoint yet"

    # -- evaluating

    def average(self) -> Denoiser:
        """The result as it stands: the average's weights in a network of its own. Every rank calls it."""
        _, ema = self.engines[self.result]
        denoiser = hub.restore(self.description, posthoc.denoiser_tensors(ema.gather()))
        return denoiser.to(self.cluster.device).eval().requires_grad_(False)

    # -- keeping

    def save(self) -> None:
        checkpoint.save(self.out / "checkpoints", self.images_seen, self.engines, self.cluster, {}, self.config.loop.keep)

    def _resume(self, stages: list[Stage]) -> list[Stage]:
        """Go to where the latest good checkpoint is. Returns the stages that are left, the first of them entered."""
        folder = checkpoint.latest_good(self.out / "checkpoints")
        self.images_seen = 0 if folder is None else checkpoint.images_of(folder)
        left = [stage for stage in stages if stage.images > self.images_seen] or stages[-1:]
        self.begin(left[0])
        if self.images_seen > left[0].start:
            checkpoint.load(folder, self.engines)
        return left

    def export(self) -> None:
        """OUT/model: the result, for `load_denoiser` and `fewstep sample`."""
        self.write_model(self.out / "model")

    def write_model(self, folder: Path) -> None:
        """The result as it stands, as a model's folder. Every rank calls it."""
        tensors = posthoc.denoiser_tensors(self.engines[self.result][1].gather())
        if self.cluster.is_main:
            trained = {"method": self.method, "images": self.images_seen, "seed": self.config.seed, "teacher": self.config.teacher}
            hub.save(folder, {**self.description, "trained": trained}, tensors)
        self.cluster.barrier()

    @contextmanager
    def _listening(self):
        """On Ctrl-C, SIGTERM and SIGUSR1: finish to the next report, checkpoint, leave. A second Ctrl-C leaves at once."""
        def stop(number, frame):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.asked_to_stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
