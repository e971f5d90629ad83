"""Encoded images to square pixels."""

import io
from collections.abc import Sequence

import fsspec
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trainers.config import ConfigError, DataConfig

UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files


def decode(rows: Sequence[dict], i: int, config: DataConfig, first: int = 0) -> tuple[Tensor, int]:
    """Row i as pixels [C, R, R] uint8, and the row that they came from: with skip_bad, the next one that decodes.

    rows: {"bytes", "path"}. first: what number the messages give to row 0. Raises ConfigError for images that do not decode.
    """
    for j in (k % len(rows) for k in range(i, i + len(rows))):
        row = rows[j]
        try:
            return _to_pixels(Image.open(_file(row)), config), j
        except UNDECODABLE as error:
            name = row.get("path") or f"image {first + j} of {config.source}"
            if not config.skip_bad:
                reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error  # whose own message names a buffer
                raise ConfigError(f"{name} is not an image that decodes ({reason}): remove it, or set data.skip_bad") from None
    raise ConfigError(f"none of {len(rows)} images in a row of {config.source} decodes")


def _file(row: dict):
    """What Pillow can open: encoded bytes, a local path, or an address on the hub."""
    if row["bytes"] is not None:
        return io.BytesIO(row["bytes"])
    return fsspec.open(row["path"]).open() if "://" in row["path"] else row["path"]


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
