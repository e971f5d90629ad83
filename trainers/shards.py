"""Rows of tensors in a folder of safetensors files, with an index: what `fewstep pairs` and `fewstep cache` write, and training reads.

Each file is written whole or not at all, so that an interrupted run goes on; several processes share the work by file. The index says
whose rows these are, from before the first file on, and how many, once they are all there.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from trainers.config import ConfigError, require


def ranks() -> tuple[int, int]:
    """This process's number in a launch, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def replace(path: Path, write) -> None:
    """Write a file aside with `write(path)`, then move it to its place."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.touch()
    mode = aside.stat().st_mode  # safetensors would leave a file that nobody else can read
    write(aside)
    aside.chmod(mode)
    os.replace(aside, path)


@dataclass(frozen=True)
class Shards:
    """A folder of rows. kind: the files' first name, and the index's; command: what writes them, for messages."""

    folder: Path
    kind: str
    command: str
    keys: tuple[str, ...]
    per_file: int
    handles: dict = field(default_factory=dict, compare=False)  # files opened by `take`

    def __getstate__(self) -> dict:
        return {**self.__dict__, "handles": {}}  # open files do not travel to a worker process

    # -- the index

    @staticmethod
    def about(folder: Path, kind: str) -> dict:
        """The index: identity and "count", which is 0 until all rows are there. Raises ConfigError where it cannot be read."""
        file = folder / f"{kind}.json"
        try:
            return json.loads(file.read_text()) if file.is_file() else {"count": 0}
        except ValueError:
            raise ConfigError(f"{file} is damaged: remove it with its folder, and make it anew") from None

    def claim(self, identity: dict, refusal: str) -> None:
        """Say whose rows these will be. Raises ConfigError(refusal) where the folder holds those of another identity."""
        there = self.about(self.folder, self.kind)
        if (self.folder / f"{self.kind}.json").is_file():
            require({k: v for k, v in there.items() if k != "count"} == identity, refusal)
        else:
            self._write_index(identity, 0)

    def _write_index(self, identity: dict, count: int) -> None:
        replace(self.folder / f"{self.kind}.json", lambda path: path.write_text(json.dumps({**identity, "count": count}, indent=1)))

    def finish(self, identity: dict, count: int) -> None:
        """Write how many there are, once all ranks' files are there; if one of them fails, the launcher ends this one too."""
        if ranks()[0] == 0:
            for rows in self.parts(count):
                while not self.whole(rows):
                    time.sleep(0.5)
            self._write_index(identity, count)

    # -- the files

    def parts(self, count: int) -> list[range]:
        """The rows of each file."""
        return [range(first, min(first + self.per_file, count)) for first in range(0, count, self.per_file)]

    def mine(self, count: int) -> list[range]:
        """Of these, the files that are this rank's to write."""
        rank, world = ranks()
        return self.parts(count)[rank::world]

    def bar(self, files: list[range], unit: str) -> tqdm:
        """A progress bar over the rows of these files, on the main rank."""
        return tqdm(total=sum(map(len, files)), desc=self.kind, unit=unit, disable=None if ranks()[0] == 0 else True)

    def file(self, rows: range) -> Path:
        return self.folder / f"{self.kind}-{rows.start:09d}.safetensors"

    def write(self, rows: range, parts: list[dict[str, Tensor]]) -> None:
        """The file of these rows, from pieces of them in order."""
        tensors = {key: torch.cat([part[key] for part in parts]).contiguous().cpu() for key in self.keys}
        replace(self.file(rows), lambda aside: save_file(tensors, aside))

    def whole(self, rows: range) -> bool:
        """Whether a file is there and holds all of these rows. It is not read through: a file that is too short is noticed."""
        try:
            with safe_open(self.file(rows), "pt") as file:
                return all(file.get_slice(key).get_shape()[0] >= len(rows) for key in self.keys)
        except (OSError, SafetensorError):  # the latter for a key that is not there, too
            return False

    # -- reading

    def check(self, count: int) -> None:
        """Raise ConfigError where a file is missing or damaged."""
        for rows in self.parts(count):
            require(self.whole(rows), f"{self.file(rows)} is missing or damaged: run the same `fewstep {self.command}` again")

    def read(self, count: int, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """All rows [count, ...] of these keys."""
        found = {key: [] for key in keys}
        for rows in self.parts(count):
            with safe_open(self.file(rows), "pt") as file:
                for key in keys:
                    found[key].append(file.get_slice(key)[:len(rows)])
        return {key: torch.cat(parts) for key, parts in found.items()}

    def take(self, rows: list[int], keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Some rows of these keys, read from their files alone."""
        found = {key: [] for key in keys}
        for row in rows:
            first = row // self.per_file * self.per_file
            if first not in self.handles:
                self.handles[first] = safe_open(self.file(range(first, first + 1)), "pt")
            for key in keys:
                found[key].append(self.handles[first].get_slice(key)[row - first])
        return {key: torch.stack(parts) for key, parts in found.items()}
