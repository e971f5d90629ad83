"""Noise-image pairs for DMD's regression (Yin et al. 2023, section 4.2): what the teacher's deterministic sampler makes of a noise.

Pair i holds its noise, its image and its label together, so none can be shuffled away from the others. Files of a thousand
pairs are written whole or not at all: an interrupted run goes on, and several processes share the work by file.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from models import hub
from models.conditioning import class_labels
from models.noise import Noise
from models.sampling import sample
from trainers.config import ConfigError, require, writable
from trainers.data import Order

PER_FILE = 1000
INDEX = "pairs.json"


def _identity(teacher: str, seed: int) -> dict:
    """What pairs depend on: the teacher's description and weights, its sampler, the seed."""
    found = hub.description(teacher)
    require(found["sampler"]["type"] != "few_step", f"teacher {teacher} is a few-step student: pairs come from a deterministic sampler")
    return {"seed": seed, "weights": weights_hash(teacher), **{k: found[k] for k in ("resolution", "channels", "classes", "sampler")}}


def weights_hash(teacher: str) -> str:
    with (hub.model_folder(teacher) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def make_pairs(teacher: str, out: str, count: int, seed: int = 0, batch: int = 500, device: torch.device | str = "cpu") -> None:
    """Write `count` pairs to the folder `out`; files that are there already are kept. Ranks of a launch take files in turn.

    Raises ConfigError where the folder holds the pairs of another teacher, sampler or seed.
    """
    require(count > 0, f"count is {count}, and must be above 0")
    writable(out)
    folder, identity = Path(out), _identity(teacher, seed)
    if (folder / INDEX).is_file():
        there = {k: v for k, v in json.loads((folder / INDEX).read_text()).items() if k != "count"}
        require(there == identity, f"{out} holds pairs of another teacher, sampler or seed: give another folder")
    else:
        _write_index(folder, identity, 0)  # whose pairs these will be, from the first file on
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    denoiser = hub.load_denoiser(teacher, device)
    firsts = range(0, count, PER_FILE)[rank::world]
    bar = tqdm(total=sum(min(PER_FILE, count - first) for first in firsts), desc="pairs", unit="pair", disable=None if rank == 0 else True)
    for first in firsts:
        numbers = range(first, min(first + PER_FILE, count))
        if not _whole(_file(folder, first), len(numbers)):
            _write(_file(folder, first), [_draw(denoiser, identity, numbers[i:i + batch], seed, device) for i in range(0, len(numbers), batch)])
        bar.update(len(numbers))
    bar.close()
    if rank == 0:
        while not all(_file(folder, first).is_file() for first in range(0, count, PER_FILE)):
            time.sleep(0.5)  # the other ranks' files; if one of them fails, the launcher ends this one
        _write_index(folder, identity, count)


def _write_index(folder: Path, identity: dict, count: int) -> None:
    _replace(folder / INDEX, lambda path: path.write_text(json.dumps({**identity, "count": count}, indent=1)))


def _file(folder: Path, first: int) -> Path:
    return folder / f"pairs-{first:09d}.safetensors"


def _draw(denoiser, identity: dict, numbers: range, seed: int, device) -> dict[str, Tensor]:
    noise = Noise(seed, 0, numbers, device).normal(identity["channels"], identity["resolution"], identity["resolution"])
    labels = torch.tensor([i % identity["classes"] for i in numbers], device=device) if identity["classes"] else None
    pairs = {"noise": noise, "image": sample(denoiser, identity["sampler"], [noise], class_labels(labels))}
    return pairs if labels is None else {**pairs, "label": labels}


def _write(path: Path, parts: list[dict[str, Tensor]]) -> None:
    tensors = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    _replace(path, lambda aside: save_file(tensors, aside))


def _replace(path: Path, write) -> None:
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    write(aside)
    os.replace(aside, path)


def _whole(path: Path, count: int) -> bool:
    """Whether a file is there and holds at least `count` pairs."""
    try:
        return path.is_file() and len(load_file(path)["image"]) >= count
    except (SafetensorError, KeyError):
        return False


class Pairs:
    """A folder of pairs, in memory. Raises ConfigError where it is incomplete or does not fit the data."""

    def __init__(self, folder: str, seed: int):
        index = Path(folder) / INDEX
        self.about = json.loads(index.read_text()) if index.is_file() else {"count": 0}
        require(self.about["count"] > 0, f"regression.pairs is {folder}, and there are no finished pairs in it: make some with `fewstep pairs`")
        self.order = Order(self.about["count"], seed)
        parts = []
        for first in range(0, self.about["count"], PER_FILE):
            if not _whole(_file(Path(folder), first), min(PER_FILE, self.about["count"] - first)):
                raise ConfigError(f"{_file(Path(folder), first)} is missing or damaged: run the same `fewstep pairs` again")
            parts.append(load_file(_file(Path(folder), first)))
        self.tensors = {key: torch.cat([part[key] for part in parts])[:self.about["count"]] for key in parts[0]}

    def take(self, samples, device) -> tuple[Tensor, Tensor, dict | None]:
        """The pairs that go with these samples of the run: noise, image, condition. Every epoch has its own order."""
        rows = torch.tensor([self.order(n)[0] for n in samples])
        noise, image = (self.tensors[key][rows].to(device) for key in ("noise", "image"))
        label = self.tensors["label"][rows].to(device) if "label" in self.tensors else None
        return noise, image, class_labels(label)

