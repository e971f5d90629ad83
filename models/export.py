"""Models as folders that diffusers reads without this package.

A network that diffusers has a class for, with a schedule and times that its DDIMScheduler steps through exactly, becomes a plain DDIMPipeline.
Any other brings its code along: pipeline.py, bundled from this house's own source, so that there is one implementation of everything.
"""

import ast
import json
import os
import shutil
import symtable
from pathlib import Path

import torch

from models import hub
from models.denoiser import Denoiser
from models.hub import ModelError
from models.sampling import LATENT_CHANNELS, network_calls
from models.schedules import DiscreteVP

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
LEAST_ALPHA = 1e-3  # at which DDIMScheduler's float32 can still divide by alpha, for x0 from eps
LEAST_VARIANCE = 3e-4  # of noise at which it can still divide by sigma, for eps from x0: 1 - alpha^2 has an error of 1e-7
MODULE = "fewstep_pipeline"  # where diffusers finds the bundled classes, however pipeline.py was imported
SOURCES = ("schedules", "conditioning", "denoiser", "edm2_unet", "edm_unet", "diffusers_unet", "diffusers_conditional", "small_unets", "sampling",
           "hub", "exported")  # each after those that it uses
PARTIAL = ".partial"  # ends the name of a folder that is being written
MARK = "- fewstep-export"  # a line of an exported folder's card


def export(path: str, out: str | Path) -> list[str]:
    """A model to `out`, or each stage of a distilled run to `out`/STEPS. One line each: the folder and how to sample it.

    Raises ModelError for a model that cannot be read or sampled, and where `out` cannot be written or holds anything but exports.
    """
    out, stages = Path(out), _stages(path)
    folders = {out / str(int(stage.name)): str(stage) for stage in stages} or {out: path}
    if not all(_is_free(folder) for folder in folders) or stages and out.exists() and not _holds_exports(out):
        raise ModelError(f"{out} is there, and is no export of this kind: name a new folder with --out, or remove it")
    return [_export(model, folder) for folder, model in sorted(folders.items(), key=lambda item: item[0].name.zfill(9))]


def _stages(path: str) -> list[Path]:
    return [folder for folder in (Path(path) / "stages").glob("*") if folder.name.isdigit()]


def _is_export(folder: Path) -> bool:
    card = folder / "README.md"
    return (folder / "model_index.json").is_file() and card.is_file() and MARK in card.read_text().splitlines()


def _holds_exports(folder: Path) -> bool:
    return folder.is_dir() and all(_is_export(part) or part.name.endswith(PARTIAL) for part in folder.iterdir())


def _is_free(folder: Path) -> bool:
    """Where a model may be written: an export is replaced, and nothing else."""
    return not folder.exists() or _is_export(folder) or folder.is_dir() and not any(folder.iterdir())


def _export(path: str, out: Path) -> str:
    """Written beside `out` first, so that it appears whole or not at all."""
    about = hub.description(path)
    if "conditions" in about:
        raise ModelError(f"{path} is told prompts, which no exported pipeline takes: use it with load_denoiser")
    denoiser = hub.load_denoiser(path)
    _check_start(path, about, denoiser)
    reason, partial = obstacle(about, denoiser), out.parent / f".{out.name}{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"{out} cannot be written ({error.strerror}): name another folder with --out") from None
    if reason is None:
        _save_stock(denoiser, partial)
    else:
        _save_bundled(about, denoiser, partial)
    (partial / "README.md").write_text(card(about, reason))
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    return f"{out}: {'; '.join(_loading(str(out), about, reason))}"


def _check_start(path: str, about: dict, denoiser: Denoiser) -> None:
    """What no sampler can do, this house's included: eps at pure noise."""
    start = about["sampler"].get("timesteps") or about["sampler"].get("times") or [denoiser.schedule.t_max]
    if denoiser.prediction == "eps" and float(denoiser.schedule.alpha_sigma(start[0])[0]) == 0:
        raise ModelError(f"{path}: it predicts eps and starts where alpha is 0, of which eps says nothing: distil it with prediction v or x0")


def obstacle(about: dict, denoiser: Denoiser) -> str | None:
    """Why diffusers' DDIMPipeline cannot sample this model; None: it can, and gives the same images."""
    schedule, sampler, times = denoiser.schedule, about["sampler"], _times(denoiser, about["sampler"])
    reasons = {
        f"its network is an {about['backbone']['type']}": about["backbone"]["type"] != "DiffusersUNet",
        "it has class labels": about["classes"] > 0,
        "it makes latents": about["channels"] >= LATENT_CHANNELS,
        f"it predicts {denoiser.prediction}": denoiser.prediction not in PREDICTIONS,
        f"its schedule is {type(schedule).__name__}": not isinstance(schedule, DiscreteVP),
        f"its sampler is {sampler['type']}": times is None,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or _inexact(schedule, denoiser.prediction, times)


def _inexact(schedule: DiscreteVP, prediction: str, times: list[float]) -> str | None:
    """DDIMScheduler's trailing spacing steps exactly through T, T - T/N, ..., 0, where N divides T, and through no other times."""
    steps, T = len(times) - 1, int(schedule.t_max)
    if T % steps:
        return f"its {steps} steps do not divide the {T} levels"
    if times != [float(T - i * (T // steps)) for i in range(steps + 1)]:
        return "its times are its own"
    first, last = float(schedule.alpha_sigma(times[0])[0]), float(schedule.alpha_sigma(times[-2])[1])
    if prediction == "eps" and first < LEAST_ALPHA or prediction == "x0" and steps > 1 and last**2 < LEAST_VARIANCE:
        return f"it predicts {prediction} from alpha {first:.1e} to sigma {last:.1e}, for which float32 betas are too coarse"
    return None


def _times(denoiser: Denoiser, sampler: dict) -> list[float] | None:
    """Of the equivalent DDIM, from noise down to 0. None: it is not DDIM. One step of `few_step` is DDIM's only one."""
    if sampler["type"] == "few_step" and len(sampler["timesteps"]) == 1:
        return [float(sampler["timesteps"][0]), 0.0]
    if sampler["type"] != "ddim":
        return None
    times = sampler.get("times")
    return denoiser.schedule.grid(sampler["steps"]).tolist() if times is None else [float(t) for t in times]


def _save_stock(denoiser: Denoiser, folder: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler  # not at the top: it takes seconds

    bar = denoiser.schedule.alpha_sigma(torch.arange(1, denoiser.schedule.t_max + 1, dtype=torch.float64))[0] ** 2
    scheduler = DDIMScheduler(
        num_train_timesteps=len(bar), trained_betas=_betas(bar.tolist()), prediction_type=PREDICTIONS[denoiser.prediction],
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=0,
        rescale_betas_zero_snr=bool(bar[-1] == 0))  # changes nothing for DDIM then, and lets Euler and first-order DPM++ read it
    DDIMPipeline(denoiser.backbone.unet, scheduler).save_pretrained(folder, safe_serialization=True)


def _betas(bar: list[float]) -> list[float]:
    """alpha^2 by level -> float32 betas of which each makes up for the rounding of those before it, so that their product stays at alpha^2."""
    betas, product = [], 1.0
    for wanted in bar:
        beta = torch.tensor(1 - wanted / product, dtype=torch.float32)
        product *= float(1 - beta)
        betas.append(float(beta))
    return betas


def _save_bundled(about: dict, denoiser: Denoiser, folder: Path) -> None:
    from diffusers import __version__

    from models.exported import FewstepDenoiser

    network = FewstepDenoiser({**about, "logvar": None})
    network.denoiser.backbone.load_state_dict(denoiser.backbone.state_dict())
    network.save_pretrained(folder / "denoiser", safe_serialization=True)
    index = {"_class_name": "FewstepPipeline", "_diffusers_version": __version__, "denoiser": [MODULE, "FewstepDenoiser"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    (folder / "pipeline.py").write_text(bundle("FewstepPipeline"))


# --- pipeline.py ---------------------------------------------------------------------------------------------------------

HEAD = '''"""The model in this folder: its network and its sampler, in one file that needs torch and diffusers alone.

Bundled by `fewstep export`. License: Apache-2.0.
"""
'''
FOOT = f'''# model_index.json names the module of the network's class, and diffusers takes one that is imported already: this one, by whatever name
sys.modules["{MODULE}"] = sys.modules[__name__]
'''


def bundle(*wanted: str) -> str:
    """One file of Python with these definitions of SOURCES and all that they use, in their order. It imports nothing of this package."""
    statements = [(node, text) for name in SOURCES for node, text in _statements(Path(__file__).with_name(f"{name}.py"))]
    local = {name: (node, text) for node, text in statements if not isinstance(node, (ast.Import, ast.ImportFrom)) for name in _bound(node)}
    needed, found = list(wanted), {"sys"}
    while needed:
        name = needed.pop()
        if name not in found:
            found.add(name)
            needed += _used(local[name][1]) if name in local else []
    imports = {ast.unparse(kept) for node, _ in statements for kept in _kept(node, found)}
    bodies = [text for node, text in statements if any(local.get(name, ())[:1] == (node,) for name in _bound(node) & found)]
    return "\n".join([HEAD, *sorted(imports | {"import sys"}), "", "", "\n\n\n".join(bodies), "", "", FOOT])


def _statements(file: Path) -> list[tuple[ast.stmt, str]]:
    """Top-level statements with their text, decorators and trailing comments included."""
    text = file.read_text()
    lines = text.splitlines()
    first = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for node in ast.parse(text).body]
    return [(node, "\n".join(lines[start - 1:node.end_lineno])) for node, start in zip(ast.parse(text).body, first)]


def _bound(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    return {target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}


def _used(text: str) -> set[str]:
    """Names that a top-level statement looks up outside itself."""
    tables, found = [symtable.symtable(text, "bundle", "exec")], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {s.get_name() for s in table.get_symbols() if s.is_global() or table.get_type() == "module" and s.is_referenced()}
    return found


def _kept(node: ast.stmt, names: set[str]) -> list[ast.stmt]:
    """Of an import from another package, these names, each as an import of its own."""
    if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "module", "").split(".")[0] == "models":
        return []
    kept = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in names]
    return [ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0) for alias in kept]


# --- the card ------------------------------------------------------------------------------------------------------------


def card(about: dict, reason: str | None) -> str:
    """README.md of an exported folder. reason: why it brings its own code; None: it does not."""
    sampler, schedule = about["sampler"], {k: v for k, v in about["schedule"].items() if k != "betas"}
    settings = ", ".join(f"{key} {value}" for key, value in schedule.items() if key != "type")
    levels = f", {len(about['schedule']['betas'])} levels" if "betas" in about["schedule"] else ""
    how = "\n".join(_loading("PATH_OF_THIS_FOLDER", about, reason))
    lines = [
        "---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation", "tags:", "- diffusion", MARK, "---", "",
        f"# {_title(about)}", "",
        f"{about['resolution']}x{about['resolution']}, channels {about['channels']}, classes {about['classes'] or 'none'}. {_validity(sampler)}", "",
        "```python", how, "```", "", _code(reason), "",
        f"- prediction: {about['prediction']}", f"- schedule: {schedule['type']}{levels}" + (f" ({settings})" if settings else ""),
        f"- sampler: {json.dumps(sampler)}", f"- network: {about['backbone']['type']}",
        *([f"- guidance: an input, {about['guidance'][0]} to {about['guidance'][1]}"] if about["backbone"].get("guided") else []),
        *(f"- trained, {key}: {json.dumps(value)}" for key, value in about.get("trained", {}).items()), ""]
    return "\n".join(lines)


def _is_student(sampler: dict) -> bool:
    return sampler["type"] == "few_step" or "times" in sampler


def _title(about: dict) -> str:
    calls = network_calls(about["sampler"])
    return f"A {'distilled' if _is_student(about['sampler']) else 'diffusion'} model of {calls} network call{'s' * (calls > 1)} an image"


def _validity(sampler: dict) -> str:
    calls = network_calls(sampler)
    if not _is_student(sampler):
        return f"Not distilled: {calls} network calls are its own setting."
    return f"**Valid for {calls} step{'s' * (calls > 1)} only**, not for {'more' if calls == 1 else 'half or twice as many'}: it was distilled so."


def _loading(folder: str, about: dict, reason: str | None) -> list[str]:
    """How to sample, in lines of Python."""
    if reason is None:
        return ["from diffusers import DiffusionPipeline", f'pipe = DiffusionPipeline.from_pretrained("{folder}")',
                f"images = pipe(batch_size=16, num_inference_steps={network_calls(about['sampler'])}).images"]
    given = f"labels=list(range({min(about['classes'], 16)}))" if about["classes"] else "batch_size=16"
    given += ', output_type="latent"' * (about["channels"] >= LATENT_CHANNELS)
    return ["import sys", f'sys.path.insert(0, "{folder}")', "from pipeline import FewstepPipeline",
            f'images = FewstepPipeline.from_pretrained("{folder}")({given}).images']


def _code(reason: str | None) -> str:
    if reason is None:
        return ("A plain DDIMPipeline. Keep its scheduler as it is: trailing spacing, no clipping, eta 0. Solvers of higher order are wrong for a "
                "distilled model.")
    return (f"No pipeline of diffusers samples it ({reason}), so this folder brings its own, with the network's code, in pipeline.py: read "
            "it before you run it. Importing it, as above, asks for no permission. `DiffusionPipeline.from_pretrained(PATH, custom_pipeline=PATH)` "
            "loads it too, with trust_remote_code=True, by which diffusers is told to trust a folder's code.")
