"""Loading and saving denoisers. A folder holds `config.json`, which says what to build, and `model.safetensors`, or an adapter (models/lora.py).

Nothing here unpickles anything. NVlabs' snapshots, which end in .pkl, are read by `models/snapshots.py`; nothing in them is run.
Folders of diffusers' pipelines, which hold a model_index.json, are read by `models/diffusers_folder.py`. Either may be on the hub.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import lora
from models.denoiser import Denoiser
from models.diffusers_conditional import DiffusersPromptUNet, DiffusersSana, DiffusersSD3, PromptBackbone
from models.diffusers_unet import DiffusersUNet
from models.edm2_unet import EDM2UNet, LogVar
from models.edm_unet import DhariwalUNet, SongUNet
from models.sampling import LATENT_CHANNELS
from models.schedules import EDM, CosineVP, DiscreteVP, Flow, Schedule
from models.small_unets import ContextUNet, SmallUNet

BACKBONES = {"EDM2UNet": EDM2UNet, "DiffusersUNet": DiffusersUNet, "SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet,
             "DiffusersPromptUNet": DiffusersPromptUNet, "DiffusersSD3": DiffusersSD3, "DiffusersSana": DiffusersSana,
             "ContextUNet": ContextUNet, "SmallUNet": SmallUNet}
PARTS = ("backbone", "schedule", "prediction", "logvar", "resolution", "channels", "classes", "sampler")  # of a description
SCHEDULES = {"CosineVP": CosineVP, "DiscreteVP": DiscreteVP, "EDM": EDM, "Flow": Flow}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
WEIGHTS = "model.safetensors"
HUB_WEIGHTS = [WEIGHTS, f"model/{WEIGHTS}", lora.WEIGHTS, f"model/{lora.WEIGHTS}", "diffusion_pytorch_model.safetensors",
               "unet/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"]


class ModelError(ValueError):
    """A model that cannot be read. The message is one sentence for the user."""


def describe(denoiser: Denoiser) -> dict:
    """What `build` needs to make this network again, JSON-ready. Its "resolution", "channels" and "classes" are those of its images.

    A network that is told a prompt has "conditions" and "latents" too (`prompt_facts`).
    """
    backbone = denoiser.backbone.config
    return {
        "backbone": {"type": type(denoiser.backbone).__name__, **backbone},
        "schedule": {"type": type(denoiser.schedule).__name__, **denoiser.schedule.config()},
        "prediction": denoiser.prediction,
        "logvar": None if denoiser.logvar is None else denoiser.logvar.config,
        "resolution": backbone["img_resolution"], "channels": backbone["img_channels"], "classes": backbone["label_dim"],
        **(prompt_facts(denoiser.backbone.conditions, backbone["img_channels"]) if isinstance(denoiser.backbone, PromptBackbone) else {}),
    }


def prompt_facts(conditions: dict, channels: int) -> dict:
    """Of a network that is told a prompt: what cond holds for each image, with its shape, and whether its images are latents."""
    return {"conditions": conditions, "latents": channels >= LATENT_CHANNELS}


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


def schedule_of(description: dict) -> Schedule:
    """A described model's noise schedule."""
    return _make(description["schedule"], SCHEDULES)


def model_folder(path: str) -> Path:
    """A run's folder or a model's own -> the model's. Raises ModelError where there is none."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, lora.WEIGHTS)):
            return folder
    raise ModelError(f"{path}: there is no model there (config.json and model.safetensors, as a run writes them in OUT/model)")


def weights_name(description: dict) -> str:
    """The file beside config.json: of a network's weights, or of an adapter's where "lora" says on which base and of what kind."""
    return lora.WEIGHTS if "lora" in description else WEIGHTS


def _snapshots():
    from models import snapshots  # not at the top: it imports this module

    return snapshots


def _pipelines():
    from models import diffusers_folder  # not at the top: it imports this module

    return diffusers_folder


def _local(path: str) -> str:
    """The id of a model on the hub -> the folder of its copy here, fetched if need be; any other path -> itself."""
    if Path(path).exists() or Path(path).parts[0] in os.listdir() or not HUB_ID.fullmatch(str(path)):
        return path  # runs/x is no id where there are runs
    folder = fetch(path, ["*.json"])
    if _pipelines().is_pipeline(folder):
        _pipelines().description(folder)  # what is not supported is refused before its weights are fetched
    return fetch(path, ["*.json", *HUB_WEIGHTS])


def fetch(name: str, files: list[str]) -> str:
    """A hub id -> the folder of its copy here, with these files (patterns) of it. Raises ModelError where they cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=files)
    except Exception as error:  # huggingface_hub raises a dozen kinds for what is missing or out of reach
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{name}: there is no such folder here, and no such model could be fetched from the hub ({reason})") from None


def weights_file(path: str) -> Path:
    """The file that a model's weights are in, wherever it comes from. Raises ModelError where there is none."""
    if str(path).endswith(".pkl"):
        return Path(path)
    path = _local(path)
    return _pipelines().weights_file(path) if _pipelines().is_pipeline(path) else model_folder(path) / weights_name(description(path))


def description(path: str) -> dict:
    """What is known of a saved model without building it: the content of its config.json."""
    if str(path).endswith(".pkl"):
        return _snapshots().description(path)
    path = _local(path)
    if _pipelines().is_pipeline(path):
        return _pipelines().description(path)
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
    """A frozen denoiser in eval mode, from a run's folder, a model's, a diffusers pipeline's, a hub id or a snapshot.

    Raises ModelError where that cannot be.
    """
    if str(path).endswith(".pkl"):
        return _snapshots().load_nvlabs(path)[0].to(device)
    path = _local(path)
    if _pipelines().is_pipeline(path):
        return _pipelines().load(path).to(device).eval().requires_grad_(False)
    about = description(path)
    file = model_folder(path) / weights_name(about)
    try:
        denoiser = restore(about, load_file(file))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{file} does not fit config.json: {' '.join(str(error).split())[:300]}") from None
    return denoiser.to(device).eval().requires_grad_(False)


def restore(description: dict, tensors: dict[str, Tensor]) -> Denoiser:
    """The described denoiser with these weights, of a LoRA its base with the adapter merged. Raises ValueError where they do not fit."""
    if "lora" not in description:
        denoiser = build(description)
        denoiser.load_state_dict(tensors)
        return denoiser
    adapter = description["lora"]
    try:
        backbone = load_denoiser(adapter["base"]).backbone
    except ModelError as error:
        raise ModelError(f"it is a LoRA on {adapter['base']}, which cannot be read: {error}") from None
    lora.merge(backbone, adapter, tensors)
    return Denoiser(backbone, schedule_of(description), description["prediction"])


def save(folder: str | Path, description: dict, tensors: dict[str, Tensor]) -> None:
    """Write a model's folder. Each file appears whole or not at all, the description last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name, metadata = weights_name(description), lora.file_metadata(description["lora"], tensors) if "lora" in description else None
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f".{name}", metadata)
    os.replace(folder / f".{name}", folder / name)
    (folder / ".config.json").write_text(json.dumps(description, indent=1))
    os.replace(folder / ".config.json", folder / "config.json")
