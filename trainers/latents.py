"""Caches of latents: an image set passed once through an autoencoder, so that training reads latents instead of images.

A cache keeps each image's posterior, mean and standard deviation of the raw latent, and its label. `data.LatentSet` draws the latent anew
each time that it is read, as EDM2 does (Karras et al. 2024), and normalises it.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.autoencoder import Autoencoder
from trainers.config import DataConfig, is_cache, require, writable
from trainers.data import latent_shards, load_images, read

FILE_ROWS, FILE_BYTES = 1 << 12, 1 << 28  # of a file, at most: what an interruption costs, and what a process holds in memory
PRECISION = torch.float16  # half the space of float32; its rounding moves a normalised latent by 1e-4, a twentieth of the smallest noise in sampling


class _Rows(Dataset):
    """Rows of an image set, decoded by whichever process asks."""

    def __init__(self, images):
        self.images = images

    def __getitems__(self, rows: range) -> tuple[Tensor, Tensor | None]:
        return self.images.take(rows)


def make_cache(source: str, autoencoder: str, out: str, split: str = "train", resolution: int = 512, classes: int = 1000, fit: str = "crop",
               batch: int = 8, device: torch.device | str = "cpu", skip_bad: bool = False, workers: int = 0) -> None:
    """Encode an image set to the folder `out`; files that are there already are kept. Ranks of a launch take files in turn.

    source, split, resolution, classes, fit, skip_bad: as in DataConfig; resolution is that of the images. autoencoder: a folder or a hub id.
    batch: images encoded at a time. workers: processes that decode ahead, per rank. Raises ConfigError and ModelError for what cannot work,
    as where the folder holds the latents of another image set or autoencoder.
    """
    require(batch > 0, f"batch is {batch}, and must be above 0")
    require(not is_cache(source), f"source is {source}, and that is a cache of latents itself")
    network = Autoencoder(autoencoder, device, batch=batch)
    require(resolution > 0 and resolution % network.factor == 0, f"resolution is {resolution}, and must be a multiple of {network.factor}")
    writable(out)
    config = DataConfig(source, split, resolution, 3, classes, fit, skip_bad=skip_bad, workers=workers)
    images = load_images(config, ahead=False)
    identity = _identity(config, network, len(images))
    shards = latent_shards(out, identity)
    shards.claim(identity, f"{out} holds latents of another image set or autoencoder: give another folder")
    files = shards.mine(len(images))
    left = [rows for rows in files if not shards.whole(rows)]
    encoded = _encode(network, images, [rows[i:i + batch] for rows in left for i in range(0, len(rows), batch)], workers)
    with shards.bar(files, "img") as bar:
        bar.update(sum(map(len, files)) - sum(map(len, left)))
        for rows in left:
            parts = []
            for _ in range(0, len(rows), batch):
                parts.append(next(encoded))
                bar.update(len(parts[-1]["mean"]))
            shards.write(rows, parts)
    shards.finish(identity, len(images))


def _identity(config: DataConfig, network: Autoencoder, images: int) -> dict:
    """What a cache depends on, and how its files are laid out."""
    path = Path(config.source).expanduser()
    side = config.resolution // network.factor
    row_bytes = 2 * network.channels * side**2 * PRECISION.itemsize
    return {"source": str(path.resolve()) if path.exists() else config.source, "split": config.split, "fit": config.fit,
            "resolution": config.resolution, "images": images, "classes": config.classes, "autoencoder": network.weights_hash(),
            "normalisation": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(network.normalisation).items()},
            "latents": [network.channels, side, side], "per_file": max(1, min(FILE_ROWS, FILE_BYTES // row_bytes))}


def _encode(network: Autoencoder, images, parts: list[range], workers: int) -> Iterator[dict[str, Tensor]]:
    """The posteriors of these parts of the image set, one after the other, while the next ones are decoded."""
    for pixels, labels in read(_Rows(images), parts, workers):
        mean, std = (values.to(PRECISION) for values in network.encode(pixels))
        require(bool(mean.isfinite().all() and std.isfinite().all()), f"the autoencoder gives latents that {PRECISION} cannot hold: it is broken")
        yield {"mean": mean, "std": std} if labels is None else {"mean": mean, "std": std, "label": labels}
