"""A diffusers pipeline's folder as a denoiser: one UNet2DModel and one scheduler, as DDPMPipeline and DDIMPipeline have.

They lie in `unet/` and `scheduler/`, or both flat beside model_index.json. Weights are read from safetensors alone.
"""

import json
from pathlib import Path

from models import hub
from models.denoiser import Denoiser
from models.diffusers_unet import from_unet_config
from models.hub import ModelError
from models.schedules import DiscreteVP

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULERS = ("DDPM", "DDIM", "PNDM", "DDPMParallel", "DDIMParallel", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
              "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")  # that have betas
STEPS = 50  # of DDIM, for a pipeline's own sampler


def is_pipeline(folder: str | Path) -> bool:
    return (Path(folder) / "model_index.json").is_file()


def description(folder: str | Path) -> dict:
    """What `hub.build` makes its network of. Raises ModelError for what is not supported."""
    _check_pipeline(folder)
    unet, scheduler = _json(_part(folder, "unet", "config.json")), _json(_part(folder, "scheduler", "scheduler_config.json"))
    _check_kinds(folder, unet, scheduler)
    try:
        backbone = from_unet_config(unet)
        schedule = DiscreteVP.from_scheduler_config({"num_train_timesteps": 1000, **scheduler})
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}: {error}") from None
    prediction = PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
    if prediction == "eps" and float(schedule.alpha_sigma(schedule.t_max)[0]) == 0:
        raise ModelError(f"{folder}: it predicts epsilon, and its last level is pure noise, of which epsilon says nothing: it wants v_prediction")
    return {"backbone": {"type": "DiffusersUNet", **backbone}, "schedule": {"type": "DiscreteVP", **schedule.config()}, "prediction": prediction,
            "logvar": None, "resolution": backbone["img_resolution"], "channels": backbone["img_channels"], "classes": backbone["label_dim"],
            "sampler": {"type": "ddim", "steps": min(STEPS, int(schedule.t_max))}}


def weights_file(folder: str | Path) -> Path:
    """Of the network. Raises ModelError where it is not there as one safetensors file."""
    return _part(folder, "unet", WEIGHTS)


def load(folder: str | Path) -> Denoiser:
    """The denoiser with its weights, in float32."""
    denoiser = hub.build(description(folder))
    denoiser.backbone.unet = _unet(weights_file(folder))
    return denoiser


def _unet(file: Path):
    """diffusers' own reader, because it knows the names that older files have."""
    from diffusers import UNet2DModel

    try:
        unet, found = UNet2DModel.from_pretrained(file.parent, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except Exception as error:  # it raises a dozen kinds for what is damaged
        raise ModelError(f"{file} does not fit config.json: {' '.join(str(error).split())[:300]}") from None
    if any(found.values()):
        kind, names = next((kind, names) for kind, names in found.items() if names)
        raise ModelError(f"{file} does not fit config.json ({kind.replace('_', ' ')}: {', '.join(map(str, names))[:200]})")
    return unet.float()


def _check_pipeline(folder: str | Path) -> None:
    index = _json(Path(folder) / "model_index.json")
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0] is not None}
    if set(parts) != {"unet", "scheduler"}:
        held = ", ".join(sorted(parts)) or "nothing"
        raise ModelError(f"{folder}: a {index.get('_class_name')} of {held} is not supported: what is are DDPMPipeline, DDIMPipeline and others "
                         "of a unet and a scheduler alone")


def _check_kinds(folder: str | Path, unet: dict, scheduler: dict) -> None:
    kind = unet.get("_class_name")
    if kind != "UNet2DModel":
        raise ModelError(f"{folder}: its network is a {kind}: UNet2DModel is what is supported")
    channels = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if channels[0] != channels[1]:
        raise ModelError(f"{folder}: its network makes {channels[1]} channels of {channels[0]}: learned variances are not supported")
    kind, prediction = scheduler.get("_class_name"), scheduler.get("prediction_type", "epsilon")
    if str(kind).removesuffix("Scheduler") not in SCHEDULERS:
        raise ModelError(f"{folder}: its scheduler is a {kind}: those that have betas are supported ({', '.join(SCHEDULERS)}), flow and EDM are not")
    if prediction not in PREDICTIONS:
        raise ModelError(f"{folder}: its prediction_type is {prediction!r}, which is not one of {', '.join(PREDICTIONS)}")


def _part(folder: str | Path, part: str, name: str) -> Path:
    for file in (Path(folder) / part / name, Path(folder) / name):
        if file.is_file():
            return file
    raise ModelError(f"{folder}: there is no {part}/{name} in it" + (" (a pickle, .bin, is never read)" if name == WEIGHTS else ""))


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a configuration of diffusers ({error})") from None
    return found
