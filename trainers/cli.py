"""The command `fewstep`: what is not training."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from jsonargparse import auto_cli

from models import hub
from models.sampling import draw, network_calls
from trainers import pictures
from trainers.config import HOUSE, ConfigError, DataConfig, require, writable
from trainers.data import load_images
from trainers.metrics import class_accuracy, frechet_distance, within_class_std
from trainers.pairs import make_pairs

COLUMNS = ("FD all", "FD held back", "class accuracy", "within-class std", "network calls", "images/s")


def demo(out: str = "runs/demo", processes: int | None = None) -> None:
    """Pretrain a teacher on real handwritten digits, distil it to one step, and show both. About five minutes on two CPU cores.

    Args:
        out: The folder to write to. What is there already is not done again.
        processes: How many processes train; by default two on a CPU with two cores, else one.
    """
    writable(out)
    started = time.time()
    processes = processes or (1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
    teacher, student = f"{out}/teacher", f"{out}/student"
    _train("edm2", processes, "--out", teacher)
    _train("dmd", processes, "--out", student, "--teacher", teacher)
    torch.set_num_threads(os.cpu_count() or 1)
    rows, shown = _measure_demo(teacher, student)
    table = _table(rows)
    Path(out, "results.md").write_text(table + "\n")
    Path(out, "results.json").write_text(json.dumps(rows, indent=1))
    pictures.grids(Path(out, "samples.png"), shown)
    curve = [json.loads(line) for line in Path(student, "metrics.jsonl").read_text().splitlines()]
    pictures.progress(Path(out, "progress.png"), [(r["images_seen"], r["fd"]) for r in curve if "fd" in r],
                      {name: row["FD all"] for name, row in rows.items() if name.startswith(("teacher", "undistilled", "real"))})
    print(f"\n{table}\n\nFD: Fréchet distance on pixels, 2,000 samples against all 1,797 digits, and against the 360 that no network saw.\n"
          f"Class means alone reach 100 % accuracy: look at FD and at the std within a class too.\n"
          f"{time.time() - started:.0f} s. Look at {out}/samples.png and {out}/progress.png; the student is in {student}/model.")


def _train(method: str, processes: int, *arguments: str) -> None:
    """A trainer, as its user would start it. Tiny networks want one thread a process."""
    config = "1gpu" if torch.cuda.is_available() else "cpu_ddp" if processes > 1 else "cpu"
    command = ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", str(processes), "--mixed_precision", "no",
               "--main_process_port", "0", f"trainers/{method}.py", *(a if a.startswith("--") else os.path.abspath(a) for a in arguments)]
    print(f"$ accelerate launch {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *command], cwd=HOUSE, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    require(code == 0, f"trainers/{method}.py ended with exit code {code}")


def _measure_demo(teacher: str, student: str) -> tuple[dict, dict]:
    """-> ({model: {column: value}}, {model: images to show}), all from the same noise and classes."""
    everything, held_back, train = (load_images(DataConfig(split=split)) for split in ("all", "test", "train"))
    real = {name: data.images(range(len(data))) for name, data in (("all", everything), ("test", held_back), ("train", train))}
    about_teacher, about_student = hub.description(teacher), hub.description(student)
    undistilled = {**about_teacher, "sampler": about_student["sampler"]}
    rows, shown = {}, {}
    for name, path, about in (("teacher", teacher, about_teacher), ("undistilled, 1 step", teacher, undistilled), ("student, 1 step", student, about_student)):
        denoiser = hub.load_denoiser(path)
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


def _table(rows: dict) -> str:
    """Markdown."""
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for name, row in rows.items():
        lines.append([name, *(f"{row[c]:.4g}" if c in row else "-" for c in COLUMNS)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def sample(model: str, out: str = "samples.png", seeds: str = "0-63", labels: list[int] | None = None, batch: int = 64) -> None:
    """Draw images from a run or a model's folder, and write them as a grid.

    Args:
        model: A run's folder, or a model's.
        out: The picture to write.
        seeds: "0-63" or "3,7,9". A seed makes the same image whatever is drawn with it.
        labels: Classes, repeated over the seeds; by default all in turn.
        batch: Images drawn at a time.
    """
    numbers = _numbers(seeds)
    writable(str(Path(out).parent))
    about = hub.description(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if labels:
        require(about["classes"] > 0, f"labels is {labels}, and {model} has no classes")
        require(0 <= min(labels) and max(labels) < about["classes"], f"labels is {labels}, and {model} has classes 0 to {about['classes'] - 1}")
    chosen = torch.tensor([labels[i % len(labels)] for i in range(len(numbers))]) if labels else None
    began = time.time()
    images, _ = draw(hub.load_denoiser(model, device), about, numbers, batch, labels=chosen, progress="sampling")
    print(f"{len(images)} images, {len(images) / (time.time() - began):.1f} images/s, {network_calls(about['sampler'])} network calls each: {out}")
    pictures.grid(Path(out), images)


def _numbers(seeds: str) -> list[int]:
    try:
        parts = [part.split("-") for part in seeds.split(",")]
        return [i for part in parts for i in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        raise ConfigError(f"seeds is {seeds!r}, and must look like 0-63 or 3,7,9") from None


def score(run: str, split: str = "all", samples: int = 2000, batch: int = 500) -> None:
    """Measure a run's samples against the data that it was trained on.

    Args:
        run: A run's folder.
        split: Which part of the data.
        samples: How many to draw, all classes in turn.
        batch: Images drawn at a time.
    """
    file = Path(run) / "config.yaml"
    require(file.is_file(), f"{run} is not a run's folder: it has no config.yaml")
    data = yaml.safe_load(file.read_text())["config"]["data"]
    reference = load_images(DataConfig(**{**data, "split": split}))
    real = reference.images(range(len(reference)))
    about = hub.description(run)
    drawn, labels = draw(hub.load_denoiser(run), about, range(samples), batch, progress="sampling")
    print(f"Fréchet distance on pixels {frechet_distance(drawn, real):.4f} ({samples} samples against {len(real)} images of split {split})")
    if labels is not None:
        print(f"class accuracy {class_accuracy(drawn, labels, real, reference.labels):.4f}, within-class std {within_class_std(drawn, labels):.4f} "
              f"(real {within_class_std(real, reference.labels):.4f})")


def pairs(teacher: str, out: str, count: int = 10_000, seed: int = 0, batch: int = 500) -> None:
    """Write noise-image pairs of a teacher's deterministic sampler, for DMD's regression. Run it again to go on.

    To share the work: torchrun --nproc_per_node 8 -m trainers.cli pairs ...

    Args:
        teacher: A run's folder.
        out: The folder to write to.
        count: How many pairs.
        seed: Of their noise.
        batch: Pairs drawn at a time.
    """
    make_pairs(teacher, out, count, seed, batch, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def main() -> None:
    try:
        auto_cli([demo, sample, score, pairs], prog="fewstep", description=__doc__)
    except (ConfigError, hub.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
