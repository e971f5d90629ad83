"""What a launch asks for: an accelerate configuration, from its file or from what `accelerate launch` exported."""

import json
import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LaunchError(Exception):
    """A launch configuration that cannot work. The message is one sentence for the user."""


@dataclass(frozen=True)
class Plan:
    """The part of an accelerate configuration that concerns us, from a file or from what `accelerate launch` exported."""

    source: str
    zero_stage: int | None = None  # None: plain or DDP
    precision: str = "no"
    processes: int | None = None  # that the file asks for; how many there are is the launcher's choice
    cpu: bool = False
    deepspeed: dict = field(default_factory=dict)  # a DeepSpeed JSON to start from
    compiler: str | None = None  # torch.compile's backend; None: networks run as they are

    @classmethod
    def read(cls, path: str | None) -> "Plan":
        """From a file, or, without one, from what the launcher exported."""
        return cls.from_file(path) if path else cls.from_environment()

    @classmethod
    def from_file(cls, path: str) -> "Plan":
        """Raises LaunchError where the file is missing, is no accelerate configuration or asks for another back-end."""
        if not Path(path).is_file():
            raise LaunchError(f"--config {path}: there is no such file; accelerate_configs/ has working ones")
        try:
            config = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise LaunchError(f"--config {path}: not YAML ({str(error).splitlines()[0]})") from None
        kind = str(config.get("distributed_type", "missing")) if isinstance(config, dict) else "missing"
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED"):
            raise LaunchError(f"--config {path}: distributed_type is {kind}, and must be NO, MULTI_CPU, MULTI_GPU or DEEPSPEED")
        zero = config.get("deepspeed_config", {}) if kind == "DEEPSPEED" else {}
        return cls(path, _stage(path, zero) if kind == "DEEPSPEED" else None, str(config.get("mixed_precision") or "no"),
                   config.get("num_processes"), bool(config.get("use_cpu")), _deepspeed_base(path, zero),
                   _compiler((config.get("dynamo_config") or {}).get("dynamo_backend")))

    @classmethod
    def from_environment(cls) -> "Plan":
        env, source = os.environ, "accelerate launch"
        on = env.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        prefix = "ACCELERATE_DEEPSPEED_"
        zero = {k.removeprefix(prefix).lower(): v for k, v in env.items() if k.startswith(prefix)} if on else {}
        if "config_file" in zero:
            zero["deepspeed_config_file"] = zero["config_file"]
        return cls(source, _stage(source, zero) if on else None, env.get("ACCELERATE_MIXED_PRECISION", "no"), None,
                   env.get("ACCELERATE_USE_CPU", "false").lower() == "true", _deepspeed_base(source, zero), _compiler(env.get("ACCELERATE_DYNAMO_BACKEND")))

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise LaunchError(f"{self.source}: mixed_precision is {self.precision}, and must be one of {', '.join(PRECISIONS)}")
        if self.compiler not in (None, *torch.compiler.list_backends(exclude_tags=None)):
            raise LaunchError(f"{self.source}: dynamo_backend is {self.compiler}, and this torch has {', '.join(torch.compiler.list_backends())}")
        if self.compiler and self.zero_stage == 3:
            raise LaunchError(f"{self.source}: dynamo_backend is {self.compiler}, and ZeRO-3 fetches weights layer by layer, which cannot be compiled: "
                              f"take zero_stage 2, or dynamo_backend no")


def _compiler(backend) -> str | None:
    return None if backend in (None, False) or str(backend).lower() == "no" else str(backend).lower()  # YAML reads a bare NO as false


def _deepspeed_base(source: str, zero: dict) -> dict:
    """The DeepSpeed settings that every engine shares."""
    path = zero.get("deepspeed_config_file")
    if path and not Path(path).is_file():
        raise LaunchError(f"{source}: deepspeed_config_file {path} does not exist")
    base = json.loads(Path(path).read_text()) if path else {}
    for part in ("optimizer", "param"):
        device = zero.get(f"offload_{part}_device", "none")
        if device not in (None, "none"):
            base.setdefault("zero_optimization", {})[f"offload_{part}"] = {"device": device, "pin_memory": True}
    return base


def _stage(source: str, zero: dict) -> int | None:
    stage = int(zero.get("zero_stage", 2))
    if stage not in (0, 1, 2, 3):
        raise LaunchError(f"{source}: zero_stage is {stage}, and must be 0, 1, 2 or 3")
    return stage or None  # stage 0 shards nothing: that is DDP


def need_build_tools() -> None:
    """DeepSpeed compiles its CPU collectives with ninja and a C++ compiler, looked up on PATH."""
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):  # an environment that is not activated
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    missing = [what for what, found in {"ninja": shutil.which("ninja"), "a C++ compiler (g++)": shutil.which("g++")}.items() if not found]
    if missing:
        raise LaunchError(f"ZeRO on a CPU needs {' and '.join(missing)} on PATH: install it, or use accelerate_configs/cpu_ddp.yaml")
