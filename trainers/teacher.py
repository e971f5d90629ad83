"""The frozen teacher: where it comes from, whether it fits the data, and how it is called."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from models import hub
from models.denoiser import Denoiser
from models.edm2_unet import fold_weights
from trainers.config import ConfigError, DataConfig, recipe_path, require


@dataclass(frozen=True)
class PretrainConfig:
    """How a teacher is made where none is given: by a recipe of another trainer, once."""

    recipe: str | None = None  # None: a teacher must be given
    out: str = "runs/demo/teacher"  # the run that it becomes, or was


def find_teacher(given: str | None, pretrain: PretrainConfig, say=print) -> str:
    """The teacher's path: the one given, else the run of `pretrain`, trained first if it is not there. Says which, in one line.

    Called before any process group exists. The main process trains; the others wait for its result.
    """
    if given:
        return given
    require(pretrain.recipe is not None, "teacher is not given: name a run's folder with --teacher")
    main = int(os.environ.get("RANK", 0)) == 0
    if _is_there(pretrain.out):
        if main:
            say(f"teacher: none given, reusing {pretrain.out}")
        return pretrain.out
    if main:
        say(f"teacher: none given, pretraining one with the recipe {pretrain.recipe} into {pretrain.out}")
        _train(pretrain)
    while not _is_there(pretrain.out):
        time.sleep(1)  # if the main process fails, the launcher ends this one
    return pretrain.out


def _is_there(path: str) -> bool:
    return (Path(path) / "model" / "config.json").is_file()


def _train(pretrain: PretrainConfig) -> None:
    """In a process of its own, outside this job's process group."""
    recipe = recipe_path(pretrain.recipe)
    method = yaml.safe_load(recipe.read_text())["method"]
    private = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "NCCL_ASYNC")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(private)}
    command = [sys.executable, "-m", f"trainers.{method}", "--recipe", str(recipe), "--out", pretrain.out]
    if subprocess.run(command, env=environment).returncode:
        raise ConfigError(f"pretraining the teacher failed: run it by itself to see why, {' '.join(command[1:])}")


def check_teacher(path: str, data: DataConfig) -> dict:
    """The teacher's description. Raises ConfigError where it and the data disagree."""
    found = hub.description(path)
    for name in ("resolution", "channels", "classes"):
        wanted = getattr(data, name)
        require(found[name] == wanted, f"data.{name} is {wanted}, and the teacher {path} was trained with {found[name]}: they must agree")
    return found


def load_teacher(path: str, cluster) -> Denoiser:
    """On this rank's device, in eval mode, without gradient, in the run's precision. Buffers keep float32. It is for calling only."""
    teacher = fold_weights(hub.load_denoiser(path, cluster.device))
    for p in teacher.parameters():
        p.data = p.data.to(cluster.dtype)
    return cluster.compiled(teacher)
