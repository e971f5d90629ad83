"""Configuration: frozen dataclasses, a recipe on top of their defaults, `--section.field value` on top of the recipe.

Everything that cannot work is refused here, before any network is built, in one sentence that names the field, the value and
the mend. A trainer's own sections stand in its file; what all of them share stands here.
"""

import dataclasses
import difflib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_type_hints

import yaml
from jsonargparse import ArgumentParser

HOUSE = Path(__file__).resolve().parents[1]


class ConfigError(Exception):
    """A configuration that cannot work. The message is one sentence for the user."""


def is_cache(source: str) -> bool:
    """Whether a data source is a folder of latents, as `fewstep cache` writes it: it holds their index."""
    return (Path(source) / "latents.json").is_file()


@dataclass(frozen=True)
class DataConfig:
    """Where images come from. They reach the networks square, in [-1, 1]; latents have standard deviation 0.5."""

    source: str = "digits"  # "digits" (embedded), a folder of images, a .parquet file, a hub id, or a folder that `fewstep cache` wrote
    split: str = "train"
    resolution: int = 8  # pixels, such as the network takes; of latents, their own
    channels: int = 1  # 1: grey, 3: RGB, 4: latents
    classes: int = 10  # 0: labels are not used
    fit: str = "crop"  # "crop": scale the shorter side and cut the middle; "pad": centre on black, without scaling
    xflip: bool = False  # mirror half of the images, at random
    streaming: bool = False  # read from front to back, for sets too large to download or to index; every rank reads all and decodes its part
    skip_bad: bool = False  # pass over images that do not decode, instead of stopping at the first
    workers: int = 0  # processes that decode ahead, per rank; sets that fit in memory are decoded once at the start


@dataclass(frozen=True)
class LoopConfig:
    """The loop: everything in images, so that another number of GPUs changes nothing else."""

    batch: int = 64  # images a step, over all ranks
    log_every: int = 10_000
    save_every: int = 100_000  # 0: only at the end
    eval_every: int = 0  # 0: never
    snapshot_every: int = 0  # of the averages, for `fewstep ema` to combine afterwards; 0: never
    keep: int = 2  # checkpoints that stay on disk
    max_refused: int = 10  # updates in a row that may be refused for a loss that is not finite
    tracker: str = "tensorboard"  # or another that accelerate knows, or "none"
    stopped: str | None = None  # a file to make when a signal has stopped the run, for a scheduler that is to start it again


@dataclass(frozen=True)
class EvalConfig:
    samples: int = 2000
    batch: int = 500  # images drawn at a time, per rank
    split: str = "all"  # the images that samples are compared with
    fd_resolution: int = 0  # pixels a side to which both are averaged down for the Fréchet distance, whose features they are; 0: as they are
    autoencoder: str | None = None  # what decodes latents for OUT/samples: a folder or hub id of an AutoencoderKL


@dataclass(frozen=True)
class RunConfig:
    """What every trainer has. `recipe` and `config` are read first; the rest may stand in the recipe."""

    recipe: str = ""
    config: str | None = None  # an accelerate configuration file
    out: str = "runs/run"  # by default named after the recipe
    images: int = 100_000  # train until this many were seen
    teacher: str | None = None  # a run's folder
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def check(self, world: int) -> None:
        """Raise ConfigError for what cannot work on `world` processes."""
        positive = {"images": self.images, "data.resolution": self.data.resolution, "loop.batch": self.loop.batch,
                    "loop.log_every": self.loop.log_every, "loop.keep": self.loop.keep, "eval.samples": self.eval.samples,
                    "eval.batch": self.eval.batch, "loop.max_refused": self.loop.max_refused}
        for name, value in positive.items():
            require(value is None or value > 0, f"{name} is {value}, and must be above 0")
        require(self.data.channels in (1, 3, 4), f"data.channels is {self.data.channels}, and must be 1 or 3 for images, 4 for latents")
        for name, value in {"data.classes": self.data.classes, "data.workers": self.data.workers, "loop.save_every": self.loop.save_every,
                            "loop.eval_every": self.loop.eval_every, "loop.snapshot_every": self.loop.snapshot_every}.items():
            require(value >= 0, f"{name} is {value}, and must not be below 0")
        fd = self.eval.fd_resolution
        require(fd == 0 or fd > 0 and self.data.resolution % fd == 0,
                f"eval.fd_resolution is {fd}, and must divide data.resolution {self.data.resolution}, or be 0")
        require(self.data.fit in ("crop", "pad"), f"data.fit is {self.data.fit!r}, and must be crop or pad")
        require(self.loop.batch % world == 0,
                f"loop.batch is {self.loop.batch}, which {world} processes cannot share equally: take {_next_multiple(self.loop.batch, world)}")
        writable(self.out)

    def micro_batch(self, name: str, world: int, accumulation: int) -> int:
        """Samples a microbatch of one engine on one rank. Raises ConfigError where the batch does not divide."""
        require(accumulation > 0, f"{name}.accumulation is {accumulation}, and must be above 0")
        require(self.loop.batch % (world * accumulation) == 0,
                f"loop.batch is {self.loop.batch}, which does not divide by {world} processes x {name}.accumulation {accumulation}: "
                f"take {_next_multiple(self.loop.batch, world * accumulation)}")
        return self.loop.batch // (world * accumulation)


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def writable(out: str) -> None:
    """Make an output folder, or raise ConfigError."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        probe = Path(out) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"out is {out}, and cannot be written to ({error.strerror}): give another folder with --out") from None


# --- from recipe and command line to a config ----------------------------------------------------------------------------


class _Parser(ArgumentParser):
    """jsonargparse, with errors as one sentence."""

    def error(self, message, exception=None):
        raise ConfigError(" ".join(str(message).split()))


def recipe_path(name: str) -> Path:
    """A recipe's file from its path or its bare name. Raises ConfigError, with the nearest name."""
    for path in (Path(name), HOUSE / "recipes" / f"{name}.yaml", HOUSE / name):
        if path.is_file():
            return path
    known = sorted(p.stem for p in (HOUSE / "recipes").glob("*.yaml"))
    raise ConfigError(f"recipe {name} is unknown{nearest(Path(name).stem, known)}; there are {', '.join(known)}")


def load_config(cls: type, argv: list[str], default_recipe: str, method: str):
    """A frozen config of class `cls` from its defaults, the recipe named in argv (or the default one), and argv's overrides."""
    recipe = recipe_path(_option(argv, "recipe") or default_recipe)
    try:
        content = yaml.safe_load(recipe.read_text())
        content = {} if content is None else dict(content)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"recipe {recipe} is not a YAML file of names and values: {' '.join(str(error).split())}") from None
    made_for = content.pop("method", method)
    require(made_for == method, f"recipe {recipe} is for trainers/{made_for}.py, not trainers/{method}.py")
    known = _leaves(cls)
    given = _flatten(content, known)
    for key in given:
        require(key in known, f"recipe {recipe} has an unknown key {key}{nearest(key, known)}")
    for argument in argv:
        key = argument.removeprefix("--").split("=")[0]
        require(not argument.startswith("--") or key in known or key == "help", f"--{key} is unknown{nearest(key, known)}")
    parser = _Parser(prog=f"trainers/{method}.py", description=cls.__doc__, exit_on_error=True)
    parser.add_class_arguments(cls, as_group=False)
    from_recipe = [f"--{key}={_argument(value)}" for key, value in given.items()]
    parsed = parser.parse_args([*from_recipe, *argv])
    config = cls(**vars(parser.instantiate(parsed)))
    out = config.out if "out" in given or _option(argv, "out") else f"runs/{recipe.stem}"
    return dataclasses.replace(config, recipe=str(recipe), out=out)


def _argument(value) -> str:
    """A YAML value as it would be typed: text and dates bare, all else as JSON."""
    return json.dumps(value) if value is None or isinstance(value, (bool, int, float, list, dict)) else str(value)


def _option(argv: list[str], name: str) -> str | None:
    """The value of --name in argv, before any parser looks at it. The last one counts, as it does for the parser."""
    found = None
    for i, argument in enumerate(argv):
        if argument.startswith(f"--{name}="):
            found = argument.split("=", 1)[1]
        elif argument == f"--{name}":
            require(i + 1 < len(argv), f"--{name} wants a value")
            found = argv[i + 1]
    return found


def _leaves(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields, sections opened up."""
    names = []
    for name, kind in get_type_hints(cls).items():
        names += _leaves(kind, f"{prefix}{name}.") if is_dataclass(kind) else [prefix + name]
    return names


def _flatten(content: dict, whole: list[str] = (), prefix: str = "") -> dict:
    """Sections opened up; a field that is itself a dict, named in `whole`, stays one."""
    flat = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, whole, f"{name}.") if isinstance(value, dict) and name not in whole else {name: value}
    return flat


def nearest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, 1, 0.5)
    return f" (did you mean {found[0]}?)" if found else ""


# --- what is saved beside the weights, and what a resumed run must agree with -----------------------------------------------

MAY_CHANGE = ("recipe", "config", "out", "images", "loop.log_every", "loop.save_every", "loop.eval_every", "loop.keep", "loop.max_refused",
              "loop.tracker", "loop.stopped", "eval.", "data.workers", "data.skip_bad")


def write_config(config: RunConfig) -> None:
    """OUT/config.yaml: the resolved configuration, versions, git commit and command line."""
    about = {"command": sys.argv, "commit": _commit(), "python": sys.version.split()[0],
             **{name: version(name) for name in ("fewstep", "torch", "accelerate", "deepspeed")}}
    aside = Path(config.out) / ".config.yaml"
    aside.write_text(yaml.safe_dump({"config": _plain(config), "about": about}, sort_keys=False))
    os.replace(aside, Path(config.out) / "config.yaml")


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    return subprocess.run(["git", "-C", str(HOUSE), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None


def _plain(config) -> dict:
    """A dataclass as plain YAML values."""
    return yaml.safe_load(yaml.safe_dump(_lists(dataclasses.asdict(config))))


def _lists(value):
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_same_run(config: RunConfig) -> None:
    """Raise ConfigError if OUT holds a run that this configuration would not continue but contradict."""
    file = Path(config.out) / "config.yaml"
    if not file.is_file() or not any((Path(config.out) / "checkpoints").glob("*")):
        return
    before, now = _flatten(yaml.safe_load(file.read_text())["config"]), _flatten(_plain(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise ConfigError(f"{config.out} holds a run with {key} {before.get(key)}, and this one has {now.get(key)}: "
                              f"give the same value to continue it, or another folder with --out to start anew")
