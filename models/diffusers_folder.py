"""A diffusers pipeline's folder as a denoiser: its network and its scheduler. Text encoders and autoencoders are not read.

They lie in `unet/` or `transformer/`, and `scheduler/`; a pipeline of a unet and a scheduler alone, as DDPMPipeline and DDIMPipeline are,
may have both flat beside model_index.json. Weights are read from safetensors alone.
"""

import json
from pathlib import Path

import torch

from models import hub
from models.denoiser import Denoiser
from models.diffusers_conditional import DiffusersPromptUNet, DiffusersSana, DiffusersSD3
from models.diffusers_unet import from_unet_config
from models.hub import ModelError
from models.schedules import DiscreteVP, Flow, Schedule

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN = ("unet", "UNet2DModel")  # the network's folder and class where there is nothing but it and a scheduler
PIPELINES = {"StableDiffusionPipeline": ("unet", "UNet2DConditionModel"), "StableDiffusionXLPipeline": ("unet", "UNet2DConditionModel"),
             "StableDiffusion3Pipeline": ("transformer", "SD3Transformer2DModel"), "SanaPipeline": ("transformer", "SanaTransformer2DModel")}
PROMPTED = {"UNet2DConditionModel": DiffusersPromptUNet, "SD3Transformer2DModel": DiffusersSD3, "SanaTransformer2DModel": DiffusersSana}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULERS = ("DDPM", "DDIM", "PNDM", "DDPMParallel", "DDIMParallel", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
              "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")  # that have betas
FLOW_LEVELS = 1000  # what a flow network is told is 1000 sigma
STEPS = 50  # of DDIM, for a pipeline's own sampler


def is_pipeline(folder: str | Path) -> bool:
    return (Path(folder) / "model_index.json").is_file()


def description(folder: str | Path) -> dict:
    """What `hub.build` makes its network of. Raises ModelError for what is not supported.

    Of a network that is told prompts, "conditions" and "latents" too, and "unconditional": such networks are trained without them now and then.
    """
    part, kind = _network_of(folder)
    config, scheduler = read_json(_part(folder, part, "config.json")), read_json(_part(folder, "scheduler", "scheduler_config.json"))
    _check_network(folder, kind, config)
    try:
        backbone = PROMPTED[kind].from_diffusers(config) if kind in PROMPTED else from_unet_config(config)
        schedule, prediction = _flow(folder, scheduler) if part == "transformer" else _betas(folder, scheduler)
    except ModelError:
        raise
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}: {error}") from None
    about = {"backbone": {"type": PROMPTED[kind].__name__ if kind in PROMPTED else "DiffusersUNet", **backbone},
             "schedule": {"type": type(schedule).__name__, **schedule.config()}, "prediction": prediction,
             "logvar": None, "resolution": backbone["img_resolution"], "channels": backbone["img_channels"], "classes": backbone["label_dim"],
             "sampler": {"type": "ddim", "steps": min(STEPS, int(schedule.t_max)) if isinstance(schedule, DiscreteVP) else STEPS}}
    if kind not in PROMPTED:
        return about
    return {**about, **hub.prompt_facts(PROMPTED[kind].conditions_of(backbone), backbone["img_channels"]), "unconditional": True}


def weights_file(folder: str | Path) -> Path:
    """Of the network. Raises ModelError where it is not there as one safetensors file."""
    part = _network_of(folder)[0]
    if (Path(folder) / part / f"{WEIGHTS}.index.json").is_file():
        raise ModelError(f"{folder}: the weights in {part} are split over several files: save them as one, with save_pretrained(max_shard_size=\"100GB\")")
    return _part(folder, part, WEIGHTS)


def load(folder: str | Path) -> Denoiser:
    """The denoiser with its weights, in float32."""
    from diffusers import SanaTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel  # noqa: F401: so that none of it is on meta

    about, part = description(folder), _network_of(folder)[0]
    with torch.device("meta"):  # its weights are about to be replaced: no random ones are made
        backbone = hub.build(about).backbone
    setattr(backbone, part, _network(type(getattr(backbone, part)), weights_file(folder)))
    return Denoiser(backbone, hub.schedule_of(about), about["prediction"])


def _network(kind: type, file: Path):
    """diffusers' own reader, because it knows the names that older files have."""
    try:
        network, found = kind.from_pretrained(file.parent, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except Exception as error:  # it raises a dozen kinds for what is damaged
        raise ModelError(f"{file} does not fit config.json: {' '.join(str(error).split())[:300]}") from None
    if any(found.values()):
        kind, names = next((kind, names) for kind, names in found.items() if names)
        raise ModelError(f"{file} does not fit config.json ({kind.replace('_', ' ')}: {', '.join(map(str, names))[:200]})")
    return network.float()


def _network_of(folder: str | Path) -> tuple[str, str]:
    """Where a pipeline has its network, and of what class it is. Raises ModelError for a pipeline that is not supported."""
    index = read_json(Path(folder) / "model_index.json")
    name = index.get("_class_name")
    parts = {part for part, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0] is not None}
    if name in PIPELINES:
        return PIPELINES[name]
    if parts != {"unet", "scheduler"}:
        raise ModelError(f"{folder}: a {name} of {', '.join(sorted(parts)) or 'nothing'} is not supported: what is are {', '.join(PIPELINES)}, and "
                         "DDPMPipeline, DDIMPipeline and others of a unet and a scheduler alone")
    return PLAIN


def _check_network(folder: str | Path, wanted: str, config: dict) -> None:
    if config.get("_class_name") != wanted:
        raise ModelError(f"{folder}: its network is a {config.get('_class_name')}: {wanted} is what is supported")
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if wanted not in PROMPTED and channels[0] != channels[1]:
        raise ModelError(f"{folder}: its network makes {channels[1]} channels of {channels[0]}: learned variances are not supported")


def _betas(folder: str | Path, scheduler: dict) -> tuple[Schedule, str]:
    """The schedule and prediction of a scheduler that has betas."""
    kind, prediction = scheduler.get("_class_name"), scheduler.get("prediction_type", "epsilon")
    if str(kind).removesuffix("Scheduler") not in SCHEDULERS:
        raise ModelError(f"{folder}: its scheduler is a {kind}: those that have betas are supported ({', '.join(SCHEDULERS)}), flow and EDM are not")
    if prediction not in PREDICTIONS:
        raise ModelError(f"{folder}: its prediction_type is {prediction!r}, which is not one of {', '.join(PREDICTIONS)}")
    schedule, prediction = DiscreteVP.from_scheduler_config({"num_train_timesteps": 1000, **scheduler}), PREDICTIONS[prediction]
    if prediction == "eps" and float(schedule.alpha_sigma(schedule.t_max)[0]) == 0:
        raise ModelError(f"{folder}: it predicts epsilon, and its last level is pure noise, of which epsilon says nothing: it wants v_prediction")
    return schedule, prediction


def _flow(folder: str | Path, scheduler: dict) -> tuple[Schedule, str]:
    """The schedule and prediction of a flow's scheduler: FlowMatchEulerDiscreteScheduler, or the DPMSolverMultistepScheduler that Sana has."""
    kind = scheduler.get("_class_name")
    solver = kind == "DPMSolverMultistepScheduler" and scheduler.get("use_flow_sigmas") and scheduler.get("prediction_type") == "flow_prediction"
    if kind != "FlowMatchEulerDiscreteScheduler" and not solver:
        raise ModelError(f"{folder}: its scheduler is a {kind}: a transformer's must be FlowMatchEulerDiscreteScheduler, or "
                         "DPMSolverMultistepScheduler with use_flow_sigmas and prediction_type flow_prediction")
    if scheduler.get("use_dynamic_shifting"):
        raise ModelError(f"{folder}: its scheduler shifts times by the image's size (use_dynamic_shifting): save it with a fixed shift instead")
    if scheduler.get("invert_sigmas") or scheduler.get("num_train_timesteps", FLOW_LEVELS) != FLOW_LEVELS:
        raise ModelError(f"{folder}: its scheduler has invert_sigmas or num_train_timesteps other than {FLOW_LEVELS}, which is not supported")
    return Flow(float(scheduler.get("flow_shift" if solver else "shift", 1.0))), "flow"


def _part(folder: str | Path, part: str, name: str) -> Path:
    for file in (Path(folder) / part / name, Path(folder) / name):
        if file.is_file():
            return file
    raise ModelError(f"{folder}: there is no {part}/{name} in it" + (" (a pickle, .bin, is never read)" if name == WEIGHTS else ""))


def read_json(file: Path) -> dict:
    """A configuration of diffusers. Raises ModelError where it is none."""
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a configuration of diffusers ({error})") from None
    return found
