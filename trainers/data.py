"""Images, through `datasets`: the embedded digits, a folder, parquet, or a hub id. No network is needed unless a hub id is named.

Order is a function of (seed, epoch), and a step's images one of (seed, images seen): a resumed run goes on where it stopped,
on any number of processes.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.conditioning import class_labels, take
from models.noise import Noise
from trainers.config import ConfigError, DataConfig

IN_MEMORY = 1 << 30  # bytes of pixels up to which a set is decoded once, at the start


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


UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files


class ImageSet(Dataset):
    """Images [C, R, R] uint8 and labels, by row. `pixels` is the whole set decoded, where it fits in memory."""

    def __init__(self, rows, config: DataConfig, labels: np.ndarray | None, progress: bool):
        self.rows, self.config, self.pixels = rows, config, None
        self.labels = torch.from_numpy(labels.astype(np.int64)) if labels is not None else None
        if len(rows) * config.channels * config.resolution**2 <= IN_MEMORY:
            order = tqdm(range(len(rows)), desc="decoding images", unit="img", disable=None if progress else True)
            found = [self._decode(i) for i in order]
            self.pixels = torch.stack([pixels for pixels, _ in found])
            if self.labels is not None:
                self.labels = self.labels[torch.tensor([row for _, row in found])]

    def __len__(self) -> int:
        return len(self.rows)

    def _decode(self, i: int) -> tuple[Tensor, int]:
        """Row i, and the row that it came from: with skip_bad, the next one that decodes."""
        for j in range(i, i + len(self.rows)):
            row = self.rows[j % len(self.rows)]
            try:
                return _to_pixels(Image.open(io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"]), self.config), j % len(self.rows)
            except UNDECODABLE as error:
                name = row.get("path") or f"row {j % len(self.rows)} of {self.config.source}"
                if not self.config.skip_bad:
                    raise ConfigError(f"{name} is not an image that decodes ({error}): remove it, or set data.skip_bad") from None
        raise ConfigError(f"no image of {self.config.source} decodes")

    def take(self, rows) -> tuple[Tensor, Tensor | None]:
        """Rows -> (float [n, C, R, R] in [-1, 1], labels [n] or None)."""
        rows = torch.as_tensor(rows)
        if self.pixels is None:
            found = [self._decode(i) for i in rows.tolist()]
            pixels, rows = torch.stack([pixels for pixels, _ in found]), torch.tensor([row for _, row in found])
        else:
            pixels = self.pixels[rows]
        return self._scale(pixels), None if self.labels is None else self.labels[rows]

    def images(self, rows) -> Tensor:
        """Rows -> float [n, C, R, R] in [-1, 1]."""
        return self.take(rows)[0]

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


def _to_pixels(image: Image.Image, config: DataConfig) -> Tensor:
    image = image.convert("L" if config.channels == 1 else "RGB")
    R = config.resolution
    if config.fit == "pad":
        canvas = Image.new(image.mode, (R, R))
        canvas.paste(image, ((R - image.width) // 2, (R - image.height) // 2))
        image = canvas
    elif image.size != (R, R):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((R, R), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = np.asarray(image)
    return torch.from_numpy(pixels.copy()).view(R, R, -1).permute(2, 0, 1).contiguous()


def load_images(config: DataConfig, progress: bool = True) -> ImageSet:
    """The image set that a configuration names. Raises ConfigError, in one sentence, for everything that is wrong with it."""
    if config.source == "digits":
        for name, value, wanted in (("resolution", config.resolution, 8), ("channels", config.channels, 1)):
            if value != wanted:
                raise ConfigError(f"data.{name} is {value}, and the embedded digits have {wanted}")
        _check_labels(config, np.arange(10))
        if config.split not in ("train", "test", "all"):
            raise ConfigError(f"data.split is {config.split}, and the embedded digits have train, test and all")
        return Digits(config)
    rows, image_column = _open(config)
    labels = _labels(rows, config)
    return ImageSet(rows.cast_column(image_column, _undecoded())[image_column], config, labels, progress)


def _undecoded():
    import datasets

    return datasets.Image(decode=False)


def _open(config: DataConfig):
    """-> (a datasets.Dataset, the name of its image column)."""
    import datasets

    path = Path(config.source)
    try:
        if path.is_dir():
            splits = datasets.load_dataset("imagefolder", data_dir=str(path))
        elif path.suffix == ".parquet" and path.is_file():
            splits = datasets.load_dataset("parquet", data_files=str(path))
        elif path.suffix == ".parquet" or config.source.startswith((".", "/", "~")):
            raise ConfigError(f"data.source is {config.source}, and there is no such file or folder")
        else:
            splits = datasets.load_dataset(config.source)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises a dozen kinds for a set that is missing, empty, damaged or out of reach
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"data.source is {config.source}, and cannot be read ({type(error).__name__}: {said})") from None
    rows = _split(splits, config)
    if len(rows) == 0:
        raise ConfigError(f"data.source is {config.source}, and there is no image in it")
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            return rows, name
    raise ConfigError(f"data.source is {config.source}, and none of its columns holds images: {', '.join(rows.column_names)}")


def _split(splits, config: DataConfig):
    """The split that is asked for: "all" is all of them, and a set with only one has no other to offer."""
    import datasets

    if config.split == "all":
        return datasets.concatenate_datasets(list(splits.values()))
    if config.split not in splits and len(splits) > 1:
        raise ConfigError(f"data.split is {config.split}, and {config.source} has {', '.join(splits)}")
    return splits.get(config.split) or next(iter(splits.values()))


def _labels(rows, config: DataConfig) -> np.ndarray | None:
    if not config.classes:
        return None
    column = next((name for name in ("label", "labels", "class") if name in rows.column_names), None)
    if column is None:
        raise ConfigError(f"data.classes is {config.classes}, and {config.source} has no labels: set data.classes to 0")
    labels = np.asarray(rows[column])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"data.classes is {config.classes}, and column {column} of {config.source} holds something else than whole numbers")
    _check_labels(config, labels)
    return labels


def _check_labels(config: DataConfig, labels: np.ndarray) -> None:
    if config.classes and (labels.min() < 0 or labels.max() >= config.classes):
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
        self.images, self.order, self.xflip = images, Order(len(images), seed), xflip

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor | None]:
        placed = [self.order(p) for p in positions]
        pixels, labels = self.images.take([row for row, _ in placed])
        if self.xflip:
            flips = torch.tensor([flip for _, flip in placed]).view(-1, 1, 1, 1)
            pixels = torch.where(flips, pixels.flip(3), pixels)
        return pixels, labels


def batches(images: ImageSet, config: DataConfig, seed: int, batch: int, start: int, rank: int, world: int, device) -> Iterator[Batch]:
    """This rank's part of every step from `start` images seen on, without end."""
    share = batch // world

    def positions():
        first = start + rank * share
        while True:
            yield list(range(first, first + share))
            first += batch

    loader = DataLoader(Stream(images, seed, config.xflip), batch_sampler=positions(), num_workers=config.workers, collate_fn=_as_it_is,
                        pin_memory=torch.device(device).type == "cuda", persistent_workers=config.workers > 0)
    try:
        for samples, (pixels, labels) in zip(positions(), loader):
            cond = class_labels(None if labels is None else labels.to(device, non_blocking=True))
            yield Batch(pixels.to(device, non_blocking=True), cond, Noise(seed, 0, samples, device))
    except ConfigError as error:  # from a worker process it comes wrapped in that process's traceback
        raise ConfigError(str(error).strip().splitlines()[-1].removeprefix("trainers.config.ConfigError: ")) from None


def _as_it_is(items):
    return items
