"""A ladder's students beside the network that they come from, undistilled, at the same number of steps.

RUN/ladder.md  RUN/ladder.json  RUN/ladder.png  RUN/ladder_samples.png
"""

import json
import time
from pathlib import Path

import torch
import yaml

from models import hub
from models.edm2_unet import fold_weights
from models.sampling import draw
from trainers import pictures
from trainers.config import require
from trainers.ladder import top
from trainers.metrics import frechet_distance

SHOWN = (1, 2, 4, 8)  # numbers of steps whose samples are in the picture


def students(run: str) -> dict[int, Path]:
    """{steps: model's folder} of a progressive run, from many steps to few. Raises ConfigError where there is none."""
    folders = sorted((p for p in Path(run, "stages").glob("*") if p.name.isdigit()), reverse=True)
    require(bool(folders), f"{run} has no finished stages: it must be a run of trainers/progressive.py")
    return {int(p.name): p for p in folders}


def ladder_table(run: str, real: torch.Tensor, resolution: int, samples: int, batch: int, device: str) -> str:
    """Measure every student, and its teacher undistilled; write the table and the pictures. Returns the table, in markdown."""
    config = yaml.safe_load(Path(run, "config.yaml").read_text())["config"]
    teacher, guidance = config["teacher"], (config["guidance_range"] or [config["guidance"]])[0]  # a student with a range is drawn at its lowest
    about_teacher, found, shown = hub.description(teacher), students(run), {}
    network = fold_weights(hub.load_denoiser(teacher, device))

    def measure(denoiser, about, name, **guiding) -> dict:
        began = time.time()
        drawn, _ = draw(denoiser, about, range(samples), batch, progress=name, **guiding)
        shown[name] = drawn
        return {"fd": frechet_distance(drawn, real, resolution=resolution), "images/s": samples / (time.time() - began)}

    guiding = {} if guidance == 1 else {"guidance": guidance}

    def undistilled(steps: int, times: list[float] | None = None) -> dict:
        sampler = {"type": "ddim", "steps": steps, **({"times": times} if times else {})}
        return measure(network, {**about_teacher, "sampler": sampler}, f"undistilled, {steps}", **guiding)

    rows = {"teacher": measure(network, about_teacher, "teacher", **guiding), str(top(config["stages"])): {"undistilled": undistilled(top(config["stages"]))}}
    for steps, folder in found.items():
        about = hub.description(str(folder))
        same = about["schedule"] == about_teacher["schedule"]
        student = fold_weights(hub.load_denoiser(str(folder), device))
        rows[str(steps)] = {"undistilled": undistilled(steps, about["sampler"]["times"] if same else None), "student": measure(student, about, f"student, {steps}")}
    Path(run, "ladder.json").write_text(json.dumps(rows, indent=1))
    text = _table(rows, about_teacher["sampler"])
    Path(run, "ladder.md").write_text(text + "\n")
    levels = {f"teacher, {about_teacher['sampler']['type']}": rows["teacher"]["fd"]}
    curves = {who: [(int(n), row[who]["fd"]) for n, row in rows.items() if who in row] for who in ("undistilled", "student")}
    pictures.ladder(Path(run, "ladder.png"), curves, levels)
    pictures.grids(Path(run, "ladder_samples.png"), {name: shown[name] for n in SHOWN if n in found for name in (f"undistilled, {n}", f"student, {n}")}, 6, 6)
    return text


def _table(rows: dict, sampler: dict) -> str:
    lines = ["| steps | student FD | undistilled FD | images/s |", "| ---: | ---: | ---: | ---: |"]
    for steps, row in rows.items():
        if steps.isdigit():
            student = f"{row['student']['fd']:.4g}" if "student" in row else "-"
            lines.append(f"| {steps} | {student} | {row['undistilled']['fd']:.4g} | {row['undistilled']['images/s']:.4g} |")
    return "\n".join([*lines, f"\nThe teacher by its own sampler ({sampler['type']}, {sampler['steps']} steps): FD {rows['teacher']['fd']:.4g}."])
