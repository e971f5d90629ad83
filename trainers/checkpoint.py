"""Checkpoints: everything needed to go on, written so that a kill at any moment costs at most the time since the last one.

OUT/checkpoints/IMAGES/NETWORK/rank-R.safetensors   this rank's slices of masters, moments and averages, by name and offset
OUT/checkpoints/IMAGES/manifest.json                written last: the files, their sizes, and all host-side state

A checkpoint is written aside and renamed; one whose manifest is missing, or whose files have other sizes, is not taken.
Slices are stored with their offsets, so what is read does not depend on how it was sharded. No pickle is involved.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"


def save(root: Path, images: int, networks: dict, cluster, state: dict, keep: int) -> None:
    """Write one checkpoint and prune older ones to the last `keep`. Every rank calls it.

    networks: {name: (engine, its ema or None)}. state: host-side values, JSON-ready.
    """
    aside, final = root / f".writing-{images:012d}", root / f"{images:012d}"
    if cluster.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        for name in networks:
            (aside / name).mkdir(parents=True)
    cluster.barrier()
    scalars = {}
    for name, (engine, ema) in networks.items():
        kinds, scalars[name] = engine.state()
        if ema is not None:
            kinds |= {f"ema-{profile}": ema.shards(profile) for profile in ema.averages}
        tensors = {f"{kind}:{s.offset}:{s.name}": s.tensor.detach().cpu().clone() for kind, shards in kinds.items() for s in shards}
        if cluster.is_main:
            tensors |= {f"buffer:0:{n}": b.flatten() for n, b in engine.buffers().items()}
        file = aside / name / f"rank-{cluster.rank:05d}.safetensors"
        save_file(tensors, file)
        _fsync(file)
    cluster.barrier()
    if cluster.is_main:
        files = {str(f.relative_to(aside)): f.stat().st_size for f in sorted(aside.rglob("*.safetensors"))}
        manifest = {"images": images, "world": cluster.world, "files": files, "engines": scalars, "state": state}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _fsync(aside / MANIFEST)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        _fsync(root)
        for old in sorted(p for p in root.iterdir() if p.name.isdigit())[:-keep]:
            shutil.rmtree(old)
    cluster.barrier()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest_good(root: Path) -> Path | None:
    """The newest checkpoint that is whole; None if there is none. Warns about each newer one that it passes over."""
    for folder in sorted((p for p in root.glob("*") if p.name.isdigit()), reverse=True):
        damage = _damage(folder)
        if damage is None:
            return folder
        warnings.warn(f"checkpoint {folder} is passed over: {damage}", stacklevel=2)
    return None


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, size in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes and should have {size}"
    except (OSError, json.JSONDecodeError, KeyError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def images_of(folder: Path) -> int:
    """Images seen when it was written."""
    return int(folder.name)


def load(folder: Path, networks: dict) -> dict:
    """Put a checkpoint into engines and their averages; returns its `state` with "images". Every rank calls it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, (engine, ema) in networks.items():
        read = _Reader([folder / f for f in manifest["files"] if f.startswith(f"{name}/")])
        engine.load(read, manifest["engines"][name])
        for n, buffer in engine.module.named_buffers():
            buffer.copy_(read("buffer", n, 0, buffer.numel()).view(buffer.shape))
        if ema is not None:
            ema.load(read)
    return {**manifest["state"], "images": manifest["images"]}


class _Reader:
    """Slices of flattened full tensors, put together from the files of all ranks that wrote them. Reads only what is asked for."""

    def __init__(self, files: list[Path]):
        self.pieces: dict[tuple[str, str], list] = {}  # (kind, name) -> [(offset, slice of an open file)]
        for path in files:
            file = safe_open(path, framework="pt")
            for key in file.keys():
                kind, offset, name = key.split(":", 2)
                self.pieces.setdefault((kind, name), []).append((int(offset), file.get_slice(key)))

    def __call__(self, kind: str, name: str, start: int, length: int) -> Tensor:
        parts = []
        for offset, piece in sorted(self.pieces.get((kind, name), []), key=lambda p: p[0]):
            first, last = max(0, start - offset), min(piece.get_shape()[0], start + length - offset)
            if first < last:
                parts.append(piece[first:last])
        if sum(map(len, parts)) != length:
            raise ValueError(f"the checkpoint holds {sum(map(len, parts))} of {length} values of {kind} {name}")
        return torch.cat(parts) if parts else torch.empty(0)  # a rank may own nothing of a small weight
