"""Noise-image pairs for DMD's regression (Yin et al. 2023, section 4.2): what the teacher's deterministic sampler makes of a noise.

Pair i holds its noise, its image and its label together, so none can be shuffled away from the others. Files of a thousand
pairs are written whole or not at all: an interrupted run goes on, and several processes share the work by file.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from models import hub
from models.conditioning import class_labels
from models.edm2_unet import fold_weights
from models.noise import Noise
from models.sampling import sample
from trainers.config import require, writable
from trainers.data import Order
from trainers.shards import Shards

PER_FILE = 1000


def _identity(teacher: str, seed: int) -> dict:
    """What pairs depend on: the teacher's description and weights, its sampler, the seed."""
    found = hub.description(teacher)
    require(found["sampler"]["type"] != "few_step", f"teacher {teacher} is a few-step student: pairs come from a deterministic sampler")
    return {"seed": seed, "weights": weights_hash(teacher), **{k: found[k] for k in ("resolution", "channels", "classes", "sampler")}}


def weights_hash(teacher: str) -> str:
    with hub.weights_file(teacher).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def make_pairs(teacher: str, out: str, count: int, seed: int = 0, batch: int = 500, device: torch.device | str = "cpu") -> None:
    """Write `count` pairs to the folder `out`; files that are there already are kept. Ranks of a launch take files in turn.

    Raises ConfigError where the folder holds the pairs of another teacher, sampler or seed.
    """
    require(count > 0, f"count is {count}, and must be above 0")
    writable(out)
    identity = _identity(teacher, seed)
    shards = _shards(out, identity)
    shards.claim(identity, f"{out} holds pairs of another teacher, sampler or seed: give another folder")
    denoiser = fold_weights(hub.load_denoiser(teacher, device))
    files = shards.mine(count)
    with shards.bar(files, "pair") as bar:
        for rows in files:
            if not shards.whole(rows):
                shards.write(rows, [_draw(denoiser, identity, rows[i:i + batch], seed, device) for i in range(0, len(rows), batch)])
            bar.update(len(rows))
    shards.finish(identity, count)


def _shards(folder: str, identity: dict) -> Shards:
    keys = ("noise", "image", "label") if identity["classes"] else ("noise", "image")
    return Shards(Path(folder), "pairs", "pairs", keys, PER_FILE)


def _draw(denoiser, identity: dict, numbers: range, seed: int, device) -> dict[str, Tensor]:
    noise = Noise(seed, 0, numbers, device).normal(identity["channels"], identity["resolution"], identity["resolution"])
    labels = torch.tensor([i % identity["classes"] for i in numbers], device=device) if identity["classes"] else None
    pairs = {"noise": noise, "image": sample(denoiser, identity["sampler"], [noise], class_labels(labels))}
    return pairs if labels is None else {**pairs, "label": labels}


class Pairs:
    """A folder of pairs, in memory. Raises ConfigError where it is incomplete or does not fit the data."""

    def __init__(self, folder: str, seed: int):
        about = Shards.about(Path(folder), "pairs")
        require(about["count"] > 0, f"regression.pairs is {folder}, and there are no finished pairs in it: make some with `fewstep pairs`")
        self.about, shards = about, _shards(folder, about)
        shards.check(about["count"])
        self.order = Order(about["count"], seed)
        self.tensors = shards.read(about["count"], shards.keys)

    def take(self, samples, device) -> tuple[Tensor, Tensor, dict | None]:
        """The pairs that go with these samples of the run: noise, image, condition. Every epoch has its own order."""
        rows = torch.tensor([self.order(n)[0] for n in samples])
        noise, image = (self.tensors[key][rows].to(device) for key in ("noise", "image"))
        label = self.tensors["label"][rows].to(device) if "label" in self.tensors else None
        return noise, image, class_labels(label)

