"""Images, through `datasets`: the embedded digits, a folder, parquet, or a hub id, by row or as a stream; or a cache of latents.
No network is needed unless a hub id is named.

Order is a function of (seed, epoch), and a step's images one of (seed, images seen): a resumed run goes on where it stopped,
on any number of processes.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.autoencoder import Normalisation
from models.conditioning import class_labels, take
from models.noise import Noise
from trainers.config import ConfigError, DataConfig, is_cache, require
from trainers.pixels import decode
from trainers.shards import Shards

WORKERS = "forkserver"  # how worker processes start: a fork of a process with threads, as this one has, may hang
IN_MEMORY = 1 << 30  # bytes of pixels, or of latents, up to which a set is decoded once, at the start
LATENT_STREAM, FLIP_STREAM = 2_000_000, 2_000_001  # random numbers of latents, and of a streamed set's mirroring
SHUFFLED = {"bytes": 1 << 12, "paths": 1 << 21}  # rows of a streamed set that are mixed: about 0.5 GB of encoded images, 1 GB of paths
SPARE = 8  # rows of a streamed set, after an image that does not decode, that may take its place


@dataclass
class Batch:
    """This rank's part of a step: images [B, C, H, W], their condition, and the random numbers of these samples."""

    images: Tensor
    cond: dict | None
    noise: Noise

    def split(self, parts: int) -> list["Batch"]:
        """Microbatches, of equal size."""
        size = len(self.images) // parts
        cuts = [slice(i * size, (i + 1) * size) for i in range(parts)]
        return [Batch(self.images[cut], take(self.cond, cut), self.noise[cut]) for cut in cuts]

    def dropping_labels(self, share: float) -> dict | None:
        """The condition, without its label for this share of the samples, drawn anew: what a network learns to do without."""
        if not (share and self.cond):
            return self.cond
        return {"labels": self.cond["labels"].masked_fill(self.noise.uniform() < share, -1)}


class ImageSet(Dataset):
    """Images [C, R, R] uint8 and labels, by row. `pixels` is the whole set decoded, where it fits in memory."""

    def __init__(self, rows, config: DataConfig, labels: np.ndarray | None, progress: bool, ahead: bool = True):
        self.rows, self.config, self.pixels = rows, config, None
        self.labels = torch.from_numpy(labels.astype(np.int64)) if labels is not None else None
        if ahead and len(rows) * config.channels * config.resolution**2 <= IN_MEMORY:
            order = tqdm(range(len(rows)), desc="decoding images", unit="img", disable=None if progress else True)
            found = [decode(rows, i, config) for i in order]
            self.pixels = torch.stack([pixels for pixels, _ in found])
            if self.labels is not None:
                self.labels = self.labels[torch.tensor([row for _, row in found])]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows -> (float [n, C, R, R] in [-1, 1], labels [n] or None). noise: that of the samples which these rows are for."""
        rows = torch.as_tensor(rows)
        if self.pixels is None:
            found = [decode(self.rows, i, self.config) for i in rows.tolist()]
            pixels, rows = torch.stack([pixels for pixels, _ in found]), torch.tensor([row for _, row in found])
        else:
            pixels = self.pixels[rows]
        return self._scale(pixels), None if self.labels is None else self.labels[rows]

    def images(self, rows) -> Tensor:
        """Rows -> float [n, C, R, R] in [-1, 1]."""
        return self.take(rows)[0]

    def first(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Up to `count` images, and their labels."""
        return self.take(range(min(count, len(self))))

    def parts(self, positions: Iterator[list[int]], seed: int) -> Iterator:
        """What `stream` is to be asked for, to give the samples at these positions."""
        return positions

    def stream(self, seed: int, xflip: bool) -> Dataset:
        return Stream(self, seed, xflip)

    @staticmethod
    def _scale(pixels: Tensor) -> Tensor:
        return pixels.float() / 127.5 - 1


class Digits(ImageSet):
    """scikit-learn's 1,797 real handwritten digits, 8x8, values 0 to 16: they are not bytes, and are kept exact."""

    def __init__(self, config: DataConfig):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        if config.split != "all":
            parts = train_test_split(x, y, test_size=360, random_state=0, stratify=y)
            x, y = (parts[0], parts[2]) if config.split == "train" else (parts[1], parts[3])
        self.config, self.rows = config, range(len(x))
        self.pixels = torch.from_numpy(x.reshape(-1, 1, 8, 8) / 8 - 1).float()
        self.labels = torch.from_numpy(y.astype(np.int64)) if config.classes else None

    @staticmethod
    def _scale(pixels: Tensor) -> Tensor:
        return pixels


def latent_shards(folder: str, about: dict) -> Shards:
    """The files of a cache, from its index."""
    return Shards(Path(folder), "latents", "cache", ("mean", "std", "label") if about["classes"] else ("mean", "std"), about["per_file"])


class LatentSet(ImageSet):
    """A cache of latents as `fewstep cache` writes it (trainers/latents.py): rows are float [C, r, r], normalised.

    A latent is drawn from its image's posterior each time that it is read, mean + std * eps, with the eps of the sample that it is for.
    The cache has one split, which stands for whichever is asked for. Raises ConfigError where it is unfinished, damaged or of another form.
    """

    def __init__(self, config: DataConfig):
        self.config, about = config, Shards.about(Path(config.source), "latents")
        require("latents" in about, f"data.source is {config.source}, and its latents.json is not the index of a cache")
        channels, resolution, _ = about["latents"]
        again = "run the same `fewstep cache` again"
        require(about["count"] > 0, f"data.source is {config.source}, a cache of latents that is not finished: {again}")
        for name, value, there in (("channels", config.channels, channels), ("resolution", config.resolution, resolution)):
            require(value == there, f"data.{name} is {value}, and {config.source} holds latents with {there}: set it to {there}")
        require(config.classes in (0, about["classes"]),
                f"data.classes is {config.classes}, and {config.source} has {about['classes']}: set it to that, or to 0 to train without labels")
        require(not config.xflip, "data.xflip is true, and a mirrored latent is not that of a mirrored image: set it to false")
        require(not config.streaming, "data.streaming is true, and a cache of latents is read by row: set it to false")
        self.rows, self.normalisation = range(about["count"]), Normalisation(**about["normalisation"])
        self.shards = latent_shards(config.source, about)
        self.shards.check(len(self))
        self.labels = self.shards.read(len(self), ("label",))["label"] if config.classes else None
        fits = len(self) * 2 * channels * resolution**2 * 2 <= IN_MEMORY  # mean and std, of 2 bytes
        self.pixels = self.shards.read(len(self), ("mean", "std")) if fits else None

    def take(self, rows, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        rows = torch.as_tensor(rows)
        found = self.shards.take(rows.tolist(), ("mean", "std")) if self.pixels is None else {key: t[rows] for key, t in self.pixels.items()}
        mean, std = found["mean"].float(), found["std"].float()
        noise = Noise(0, LATENT_STREAM, rows.tolist()) if noise is None else noise
        latents = self.normalisation.normalize(mean + std * noise.normal(*mean.shape[1:]))
        return latents, None if self.labels is None else self.labels[rows]


class StreamedSet:
    """Images read from front to back, and never indexed. Each epoch is shuffled by a seed of its own: its files, and then its rows, among
    as many neighbours as SHUFFLED says.

    Every rank reads the rows of all, still encoded, and decodes its own alone, so that a step is the same on any number of ranks: reading
    costs as many times as there are ranks. To go on at some position is to read an epoch up to it; earlier epochs are read too where the
    set does not say how many rows it has.
    """

    def __init__(self, rows, image: str, label: str | None, config: DataConfig):
        self.config, self.image, self.label, self.count = config, image, label, _count(rows, config)
        rows = rows.reshard() if Path(config.source).is_file() else rows  # a single file is shuffled by its row groups
        self.rows = rows.select_columns([image] + [label] * bool(label))
        first = next(iter(self.rows))
        self.shuffled = SHUFFLED["paths" if first[image]["bytes"] is None else "bytes"]
        self._labels([first])

    def _labels(self, rows: list[dict]) -> np.ndarray | None:
        if self.label is None:
            return None
        labels = np.asarray([row[self.label] for row in rows])
        _check_labels(self.config, labels)
        return labels.astype(np.int64)  # no tensor: worker processes would fetch it through shared memory

    def _epoch(self, seed: int, epoch: int):
        """One file after the other: to read several at a time, `datasets` starts threads, and waits 5 s for their end."""
        return self.rows.shuffle(seed=abs(seed * 1_000_003 + epoch), buffer_size=self.shuffled, max_buffer_input_shards=1)

    def _from(self, seed: int, position: int) -> Iterator[dict]:
        """The rows from a position on, without end."""
        epoch, skipped = divmod(position, self.count) if self.count else (0, position)
        while True:
            read = 0
            for row in self._epoch(seed, epoch):
                read += 1
                if read > skipped:
                    yield row
            require(read > 0, f"data.source is {self.config.source}, and it gives no more images")
            epoch, skipped = epoch + 1, max(0, skipped - read)

    def parts(self, positions: Iterator[list[int]], seed: int) -> Iterator[tuple]:
        """(positions, their encoded images and some spare ones, labels), read here in the main process: workers decode."""
        wanted = next(positions)
        rows, ahead, spare = self._from(seed, wanted[0]), deque(), SPARE if self.config.skip_bad else 0
        while True:
            while len(ahead) < len(wanted) + spare:
                ahead.append(next(rows))
            yield wanted, [row[self.image] for row in ahead], self._labels(list(ahead))
            last, wanted = wanted[0], next(positions)
            for _ in range(wanted[0] - last):  # this rank's, and those of the others
                ahead.popleft() if ahead else next(rows)

    def stream(self, seed: int, xflip: bool) -> Dataset:
        return Decoder(self.config, seed, xflip)

    def first(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Up to `count` images, and their labels: from an epoch's start, since a set may be sorted by class."""
        rows, found = islice(self._epoch(0, 0), count), []
        while some := list(islice(rows, 256)):
            found.append(_decoded([row[self.image] for row in some], self._labels(some), len(some), self.config))
        return torch.cat([pixels for pixels, _ in found]), torch.cat([labels for _, labels in found]) if self.label else None


class Decoder(Dataset):
    """Makes images of what `StreamedSet.parts` has read."""

    def __init__(self, config: DataConfig, seed: int, xflip: bool):
        self.config, self.seed, self.xflip = config, seed, xflip

    def __getitems__(self, part: tuple) -> tuple[Tensor, Tensor | None]:
        positions, rows, labels = part
        pixels, labels = _decoded(rows, labels, len(positions), self.config, positions[0])
        return _mirror(pixels, Noise(self.seed, FLIP_STREAM, positions).uniform() < 0.5) if self.xflip else pixels, labels


def _decoded(rows: list[dict], labels: np.ndarray | None, count: int, config: DataConfig, first: int = 0) -> tuple[Tensor, Tensor | None]:
    """The first `count` rows as float images, with their labels."""
    found = [decode(rows, i, config, first) for i in range(count)]
    labels = None if labels is None else torch.from_numpy(labels[[row for _, row in found]])
    return ImageSet._scale(torch.stack([pixels for pixels, _ in found])), labels


def _mirror(images: Tensor, which: Tensor) -> Tensor:
    return torch.where(which.view(-1, 1, 1, 1), images.flip(3), images)


def load_images(config: DataConfig, progress: bool = True, ahead: bool = True) -> ImageSet | StreamedSet:
    """The image set that a configuration names. Raises ConfigError, in one sentence, for everything that is wrong with it.

    ahead: whether a set that fits in memory is decoded now, rather than image by image when it is read.
    """
    config = replace(config, source=os.path.expanduser(config.source))
    if config.source == "digits":
        for name, value, wanted in (("resolution", config.resolution, 8), ("channels", config.channels, 1), ("streaming", config.streaming, False)):
            if value != wanted:
                raise ConfigError(f"data.{name} is {value}, and the embedded digits have {wanted}")
        _check_labels(config, np.arange(10))
        if config.split not in ("train", "test", "all"):
            raise ConfigError(f"data.split is {config.split}, and the embedded digits have train, test and all")
        return Digits(config)
    if is_cache(config.source):
        return LatentSet(config)
    rows, image = _open(config)
    require(config.channels in (1, 3), f"data.channels is {config.channels}, and {config.source} holds images: 1 for grey, 3 for RGB")
    label = _label_column(rows, config)
    if config.streaming:
        return StreamedSet(rows, image, label, config)
    labels = np.asarray(rows[label]) if label else None
    _check_labels(config, labels)
    return ImageSet(rows[image], config, labels, progress, ahead)


def _open(config: DataConfig):
    """-> (a datasets.Dataset or IterableDataset, the name of its image column, which stays encoded)."""
    import datasets

    path, streaming = Path(config.source), config.streaming
    try:
        if path.is_dir():
            splits = datasets.load_dataset("imagefolder", data_dir=str(path), streaming=streaming)
        elif path.suffix == ".parquet" and path.is_file():
            splits = datasets.load_dataset("parquet", data_files=str(path), streaming=streaming)
        elif path.suffix == ".parquet" or config.source.startswith((".", "/", "~")):
            raise ConfigError(f"data.source is {config.source}, and there is no such file or folder")
        else:
            splits = datasets.load_dataset(config.source, streaming=streaming)
        rows = _split(splits, config)
        image = next((name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)), None)
        rows = rows.cast_column(image, datasets.Image(decode=False)) if image else rows
        empty = next(iter(rows), None) is None
    except ConfigError:
        raise
    except Exception as error:  # datasets raises a dozen kinds for a set that is missing, empty, damaged or out of reach
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"data.source is {config.source}, and cannot be read ({type(error).__name__}: {said})") from None
    if empty:
        raise ConfigError(f"data.source is {config.source}, and there is no image in it")
    if image is None:
        raise ConfigError(f"data.source is {config.source}, and none of its columns holds images: {', '.join(rows.column_names or ())}")
    return rows, image


def _split(splits, config: DataConfig):
    """The split that is asked for: "all" is all of them, and a set with only one has no other to offer."""
    import datasets

    if config.split == "all":
        return datasets.concatenate_datasets(list(splits.values()))
    if config.split not in splits and len(splits) > 1:
        raise ConfigError(f"data.split is {config.split}, and {config.source} has {', '.join(splits)}")
    return splits[config.split] if config.split in splits else next(iter(splits.values()))


def _count(rows, config: DataConfig) -> int | None:
    """How many rows a streamed set has, where it says so."""
    import pyarrow.parquet

    if Path(config.source).is_file():
        return pyarrow.parquet.read_metadata(config.source).num_rows
    split = (rows.info.splits or {}).get(str(rows.split))
    return split.num_examples or None if split else None


def _label_column(rows, config: DataConfig) -> str | None:
    """The column of class labels. Raises ConfigError where they are asked for, and there is none."""
    import datasets

    if not config.classes:
        return None
    column = next((name for name in ("label", "labels", "class") if name in rows.column_names), None)
    if column is None:
        raise ConfigError(f"data.classes is {config.classes}, and {config.source} has no labels: set data.classes to 0")
    if config.streaming and isinstance(rows.features[column], datasets.ClassLabel):
        _check_labels(config, np.arange(rows.features[column].num_classes))  # before any of them turns up
    return column


def _check_labels(config: DataConfig, labels: np.ndarray | None) -> None:
    if labels is None or not config.classes:
        return
    if not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"data.classes is {config.classes}, and the labels of {config.source} are something else than whole numbers")
    if labels.min() < 0:
        raise ConfigError(f"data.classes is {config.classes}, and {config.source} has labels below 0: number its classes from 0, or set data.classes to 0")
    if labels.max() >= config.classes:
        raise ConfigError(f"data.classes is {config.classes}, and {config.source} has labels from {labels.min()} to {labels.max()}: "
                          f"set it to {labels.max() + 1}, or to 0 to train without labels")


class Order:
    """An endless order of `count` rows: each epoch is a permutation of its own, a function of (seed, epoch)."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, -1

    def __call__(self, position: int) -> tuple[int, bool]:
        """-> (the row at this position, a coin toss that goes with it)."""
        epoch, i = divmod(position, self.count)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.rows = torch.randperm(self.count, generator=generator)
            self.coins = torch.rand(self.count, generator=generator) < 0.5
            self.epoch = epoch
        return int(self.rows[i]), bool(self.coins[i])


class Stream(Dataset):
    """An image set without end, addressed by position."""

    def __init__(self, images: ImageSet, seed: int, xflip: bool):
        self.images, self.seed, self.order, self.xflip = images, seed, Order(len(images), seed), xflip

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor | None]:
        placed = [self.order(p) for p in positions]
        pixels, labels = self.images.take([row for row, _ in placed], Noise(self.seed, LATENT_STREAM, positions))
        return _mirror(pixels, torch.tensor([flip for _, flip in placed])) if self.xflip else pixels, labels


def batches(images: ImageSet | StreamedSet, config: DataConfig, seed: int, batch: int, start: int, rank: int, world: int, device) -> Iterator[Batch]:
    """This rank's part of every step from `start` images seen on, without end."""
    share = batch // world

    def positions():
        first = start + rank * share
        while True:
            yield list(range(first, first + share))
            first += batch

    found = read(images.stream(seed, config.xflip), images.parts(positions(), seed), config.workers, device)
    for samples, (pixels, labels) in zip(positions(), found):
        cond = class_labels(None if labels is None else labels.to(device, non_blocking=True))
        yield Batch(pixels.to(device, non_blocking=True), cond, Noise(seed, 0, samples, device))


def read(dataset: Dataset, parts: Iterator, workers: int, device: torch.device | str = "cpu") -> Iterator:
    """What `dataset.__getitems__` makes of each part, in order; worker processes go ahead. device: where it will be sent."""
    loader = DataLoader(dataset, batch_sampler=parts, num_workers=workers, collate_fn=_as_it_is, persistent_workers=workers > 0,
                        pin_memory=torch.device(device).type == "cuda", multiprocessing_context=WORKERS if workers else None)
    try:
        yield from loader
    except ConfigError as error:  # from a worker process it comes wrapped in that process's traceback
        error.__traceback__ = None  # part of a cycle that holds the workers, and would keep them waiting
        raise ConfigError(str(error).strip().splitlines()[-1].removeprefix("trainers.config.ConfigError: ")) from None


def _as_it_is(items):
    return items
