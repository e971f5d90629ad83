"""Post-hoc EMA: stored averages of a run, combined afterwards into an average of any length (Karras et al. 2024, section 3.2).

OUT/snapshots/IMAGES-PROFILE.safetensors   one average, float16 (its buffers as they are)
OUT/snapshots/config.json                  what network they are of
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainers.config import ConfigError, require
from trainers.ema import ShardedEMA, posthoc_weights


def denoiser_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's own tensors, whether its engine trains it bare or inside a larger module."""
    inside = any(name.startswith("denoiser.") for name in tensors)
    return {n.removeprefix("denoiser."): t for n, t in tensors.items() if not inside or n.startswith("denoiser.")}


def write(out: Path, images: int, description: dict, ema: ShardedEMA, cluster) -> None:
    """Store every power-function average as it stands. Every rank calls it."""
    folder, buffers = out / "snapshots", ema.engine.buffers()
    for profile in ema.averages:
        if not profile.startswith("power-"):
            continue
        tensors = {n: t if n in buffers else t.half() for n, t in ema.gather(profile).items()}
        if cluster.is_main:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(description, indent=1))
            save_file(denoiser_tensors(tensors), folder / ".aside")
            os.replace(folder / ".aside", folder / f"{images:012d}-{profile}.safetensors")


def stored(run: str) -> list[tuple[int, float, Path]]:
    """(images, sigma_rel, file) of each stored average, in order. Raises ConfigError where there is none."""
    files = sorted((Path(run) / "snapshots").glob("*-power-*.safetensors"))
    require(bool(files), f"{run} has no stored averages: train it with --loop.snapshot_every")
    return [(int(f.stem.split("-")[0]), float(f.stem.split("-")[2]), f) for f in files]


def description(run: str) -> dict:
    return json.loads((Path(run) / "snapshots" / "config.json").read_text())


@torch.no_grad()
def reconstruct(run: str, sigma_rel: float, at: int | None = None) -> dict[str, Tensor]:
    """The average of relative width `sigma_rel` that ends at `at` images seen (None: the last stored), float32.

    Needs the memory of one model: tensors are read one by one from all files. Raises ConfigError for a width outside
    (0, 0.2887) and for an image count at which nothing was stored.
    """
    files = stored(run)
    times = sorted({images for images, _, _ in files})
    at = times[-1] if at is None else at
    require(0 < sigma_rel < 12**-0.5, f"sigma_rel is {sigma_rel}, and must lie in (0, {12**-0.5:.4f})")
    require(at in times, f"at is {at}, and {run} has averages stored at {', '.join(map(str, times))}")
    files = [entry for entry in files if entry[0] <= at]
    weights = posthoc_weights([t for t, _, _ in files], [s for _, s, _ in files], [at], [sigma_rel])[:, 0]
    return _combine([file for _, _, file in files], weights)


def _combine(files: list[Path], weights) -> dict[str, Tensor]:
    """Weighted sums of float16 tensors, in float32; others are the last file's."""
    try:
        opened = [safe_open(file, framework="pt") for file in files]
        combined = {}
        for name in opened[-1].keys():
            last = opened[-1].get_tensor(name)
            if last.dtype == torch.float16:
                last = torch.zeros_like(last, dtype=torch.float32)
                for file, weight in zip(opened, weights):
                    last.add_(file.get_tensor(name).float(), alpha=float(weight))
            combined[name] = last
        return combined
    except Exception as error:  # safetensors raises a kind of its own for files that are damaged or of another network
        raise ConfigError(f"the stored averages of {files[0].parent} do not fit together ({' '.join(str(error).split())[:200]})") from None
