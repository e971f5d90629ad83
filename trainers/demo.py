"""The demo: a teacher and its one-step student on real handwritten digits, from nothing to pictures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch

from models import hub
from models.edm2_unet import fold_weights
from models.sampling import draw, network_calls
from trainers import pictures
from trainers.compare import ladder_table
from trainers.config import HOUSE, DataConfig, require, writable
from trainers.data import load_images
from trainers.evaluation import REAL
from trainers.metrics import class_accuracy, frechet_distance, within_class_std

COLUMNS = ("FD all", "FD held back", "class accuracy", "within-class std", "network calls", "images/s")


def demo(what: Literal["dmd", "progressive"] = "dmd", out: str = "runs/demo", processes: int | None = None) -> None:
    """Pretrain a teacher on real handwritten digits, distil it to one step, and show both. About five minutes on two CPU cores.

    Args:
        what: How to distil: by matching distributions, or progressively, from 64 steps to one.
        out: The folder to write to. What is there already is not done again.
        processes: How many processes train; by default two on a CPU with two cores, else one.
    """
    writable(out)
    started = time.time()
    processes = processes or (1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
    teacher, student = f"{out}/teacher", f"{out}/{'student' if what == 'dmd' else what}"
    _train("edm2", processes, "--out", teacher)
    _train(what, processes, "--out", student, "--teacher", teacher)
    torch.set_num_threads(os.cpu_count() or 1)
    if what == "dmd":
        _show_student(out, teacher, student)
    else:
        print(f"\n{ladder_table(student, load_images(DataConfig(split='all')).first(REAL)[0], 8, 2000, 500, 'cpu')}\n\n"
              f"FD: Fréchet distance on pixels, 2,000 samples against all 1,797 digits. Look at {student}/ladder.png and {student}/ladder_samples.png.")
    print(f"{time.time() - started:.0f} s. The result is in {student}/model.")


def _show_student(out: str, teacher: str, student: str) -> None:
    rows, shown = measure(teacher, student)
    text = table(rows)
    Path(out, "results.md").write_text(text + "\n")
    Path(out, "results.json").write_text(json.dumps(rows, indent=1))
    pictures.grids(Path(out, "samples.png"), shown)
    curve = [json.loads(line) for line in Path(student, "metrics.jsonl").read_text().splitlines()]
    pictures.progress(Path(out, "progress.png"), [(r["images_seen"], r["fd"]) for r in curve if "fd" in r],
                      {name: row["FD all"] for name, row in rows.items() if name.startswith(("teacher", "undistilled", "real"))})
    print(f"\n{text}\n\nFD: Fréchet distance on pixels, 2,000 samples against all 1,797 digits, and against the 360 that no network saw.\n"
          f"Class means alone reach 100 % accuracy: look at FD and at the std within a class too.\n"
          f"Look at {out}/samples.png and {out}/progress.png.")


def _train(method: str, processes: int, *arguments: str) -> None:
    """A trainer, as its user would start it. Tiny networks want one thread a process."""
    config = "1gpu" if torch.cuda.is_available() else "cpu_ddp" if processes > 1 else "cpu"
    command = ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", str(processes), "--mixed_precision", "no",
               "--main_process_port", "0", f"trainers/{method}.py", *(a if a.startswith("--") else os.path.abspath(a) for a in arguments)]
    print(f"$ accelerate launch {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *command], cwd=HOUSE, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    require(code == 0, f"trainers/{method}.py ended with exit code {code}")


def measure(teacher: str, student: str) -> tuple[dict, dict]:
    """-> ({model: {column: value}}, {model: images to show}), all from the same noise and classes."""
    everything, held_back, train = (load_images(DataConfig(split=split)) for split in ("all", "test", "train"))
    real = {name: data.images(range(len(data))) for name, data in (("all", everything), ("test", held_back), ("train", train))}
    about_teacher, about_student = hub.description(teacher), hub.description(student)
    undistilled = {**about_teacher, "sampler": about_student["sampler"]}
    rows, shown = {}, {}
    for name, path, about in (("teacher", teacher, about_teacher), ("undistilled, 1 step", teacher, undistilled), ("student, 1 step", student, about_student)):
        denoiser = fold_weights(hub.load_denoiser(path))
        began = time.time()
        samples, labels = draw(denoiser, about, range(2000), 500, progress=f"sampling, {name}")
        rows[name] = {**_row(samples, labels, real, train.labels), "network calls": network_calls(about["sampler"]), "images/s": 2000 / (time.time() - began)}
        shown[name] = samples
    rows["real, drawn from train"] = _row(*_resampled(train), real, train.labels)
    return rows, shown


def _resampled(train) -> tuple[torch.Tensor, torch.Tensor]:
    """2,000 training digits drawn with replacement: the distance that a perfect memory of them would have."""
    rows = torch.randint(len(train), (2000,), generator=torch.Generator().manual_seed(0))
    return train.images(rows), train.labels[rows]


def _row(samples, labels, real: dict, train_labels) -> dict:
    return {"FD all": frechet_distance(samples, real["all"]), "FD held back": frechet_distance(samples, real["test"]),
            "class accuracy": class_accuracy(samples, labels, real["train"], train_labels), "within-class std": within_class_std(samples, labels)}


def table(rows: dict) -> str:
    """Markdown."""
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for name, row in rows.items():
        lines.append([name, *(f"{row[c]:.4g}" if c in row else "-" for c in COLUMNS)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
