"""Pictures, by matplotlib."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the back-end is chosen first: there may be no display)
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def tile(images: Tensor, columns: int) -> Tensor:
    """[n, C, H, W] in [-1, 1] -> one picture [H', W', 3] in [0, 1], row by row, with a thin gap."""
    images = (images.expand(-1, 3, -1, -1) + 1) / 2
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    width = max(row.shape[2] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows]
    return torch.cat(rows, dim=1).permute(1, 2, 0)


def grid(path: Path, images: Tensor, columns: int = 8) -> None:
    """Images alone, each pixel at least three pixels wide."""
    picture = tile(images, columns)
    scale = max(1, 256 // images.shape[-1] // 8)
    plt.imsave(path, picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1).clamp(0, 1).numpy())


def _save(path: Path, figure) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def grids(path: Path, sets: dict[str, Tensor], rows: int = 10, columns: int = 10) -> None:
    """Several models side by side: image i of each comes from the same noise and class."""
    down = -(-len(sets) // 4)
    across = -(-len(sets) // down)
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 4.4 * down), squeeze=False)
    for axis, (name, images) in zip(axes.flatten(), sets.items()):
        axis.imshow(tile(images[:rows * columns], columns).clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_title(name)
        axis.axis("off")
    _save(path, figure)


def progress(path: Path, curve: list[tuple[int, float]], levels: dict[str, float]) -> None:
    """Fréchet distance against images seen, with what it is to be compared with."""
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(*zip(*curve), marker="o", label="student, 1 step")
    for i, (name, value) in enumerate(levels.items()):
        axis.axhline(value, linestyle="--", linewidth=1, color=f"C{i + 1}", label=f"{name}: {value:.3f}")
    axis.set(xlabel="images seen", ylabel="Fréchet distance (pixels)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(path, figure)


def ladder(path: Path, curves: dict[str, list[tuple[int, float]]], levels: dict[str, float]) -> None:
    """Fréchet distance against the number of steps, both on logarithmic axes, as papers show it."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, points in curves.items():
        axis.plot(*zip(*points), marker="o", label=name)
    for name, value in levels.items():
        axis.axhline(value, linestyle="--", linewidth=1, color="grey", label=f"{name}: {value:.3f}")
    axis.set_xscale("log", base=2)
    steps = sorted({x for points in curves.values() for x, _ in points})
    axis.set_xticks(steps, [str(x) for x in steps])
    axis.set(xlabel="steps", ylabel="Fréchet distance (pixels)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(path, figure)


def curve(path: Path, points: list[tuple[float, float]], x: str, y: str) -> None:
    """One line with its points."""
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot(*zip(*points), marker="o")
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    _save(path, figure)
