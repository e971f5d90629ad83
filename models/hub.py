"""Loading and saving denoisers. A folder holds `config.json`, which says what to build, and `model.safetensors`.

Nothing here unpickles anything. NVlabs' snapshots, which end in .pkl, are read by `models/snapshots.py`; nothing in them is run.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.denoiser import Denoiser
from models.edm2_unet import EDM2UNet, LogVar
from models.schedules import EDM, CosineVP, DiscreteVP, Flow

BACKBONES = {"EDM2UNet": EDM2UNet}
PARTS = ("backbone", "schedule", "prediction", "logvar", "resolution", "channels", "classes", "sampler")  # of a description
SCHEDULES = {"CosineVP": CosineVP, "DiscreteVP": DiscreteVP, "EDM": EDM, "Flow": Flow}


class ModelError(ValueError):
    """A model that cannot be read. The message is one sentence for the user."""


def describe(denoiser: Denoiser) -> dict:
    """What `build` needs to make this network again, JSON-ready. Its "resolution", "channels" and "classes" are those of its images."""
    backbone = denoiser.backbone.config
    return {
        "backbone": {"type": type(denoiser.backbone).__name__, **backbone},
        "schedule": {"type": type(denoiser.schedule).__name__, **denoiser.schedule.config()},
        "prediction": denoiser.prediction,
        "logvar": None if denoiser.logvar is None else denoiser.logvar.config,
        "resolution": backbone["img_resolution"], "channels": backbone["img_channels"], "classes": backbone["label_dim"],
    }


def build(description: dict) -> Denoiser:
    """A denoiser with fresh weights. Raises ModelError where the description is not one of a network known here."""
    try:
        backbone, schedule = (_make(description[part], known) for part, known in (("backbone", BACKBONES), ("schedule", SCHEDULES)))
        logvar = None if description["logvar"] is None else LogVar(**description["logvar"])
        return Denoiser(backbone, schedule, description["prediction"], logvar)
    except (TypeError, ValueError) as error:
        raise ModelError(f"no network can be built from this description: {error}") from None


def _make(part: dict, known: dict[str, type]):
    if part["type"] not in known:
        raise ValueError(f"{part['type']} is not among {', '.join(known)}")
    return known[part["type"]](**{key: value for key, value in part.items() if key != "type"})


def model_folder(path: str) -> Path:
    """A run's folder or a model's own -> the model's. Raises ModelError where there is none."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise ModelError(f"{path}: there is no model there (config.json and model.safetensors, as a run writes them in OUT/model)")


def _snapshots():
    from models import snapshots  # not at the top: it imports this module

    return snapshots


def description(path: str) -> dict:
    """What is known of a saved model without building it: the content of its config.json."""
    if str(path).endswith(".pkl"):
        return _snapshots().description(path)
    file = model_folder(path) / "config.json"
    try:
        found = json.loads(file.read_text())
        missing = [part for part in PARTS if part not in found]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (ValueError, TypeError) as error:  # of which those for what is not JSON, or not text, are kinds
        raise ModelError(f"{file}: not a model's description ({error})") from None
    return found


def load_denoiser(path: str, device: torch.device | str = "cpu") -> Denoiser:
    """A frozen denoiser in eval mode, from a run's folder, a model's or a snapshot. Raises ModelError where that cannot be."""
    if str(path).endswith(".pkl"):
        return _snapshots().load_nvlabs(path)[0].to(device)
    folder = model_folder(path)
    denoiser = build(description(path))
    try:
        denoiser.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}/model.safetensors does not fit config.json: {' '.join(str(error).split())[:300]}") from None
    return denoiser.to(device).eval().requires_grad_(False)


def save(folder: str | Path, description: dict, tensors: dict[str, Tensor]) -> None:
    """Write a model's folder. Each file appears whole or not at all, the description last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / ".model.safetensors")
    os.replace(folder / ".model.safetensors", folder / "model.safetensors")
    (folder / ".config.json").write_text(json.dumps(description, indent=1))
    os.replace(folder / ".config.json", folder / "config.json")
