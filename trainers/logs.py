"""What a run says: one JSON object a log line, trackers, and a progress bar or, where there is no terminal, plain lines."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm


class Meter:
    """Running means of 0-d tensors, on their device: nothing is read back until `read`."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
            self.counts[key] = self.counts.get(key, 0) + 1

    def read(self, cluster) -> dict[str, float]:
        """Means over the steps since the last read and over all ranks. Synchronises, once."""
        if not self.sums:
            return {}
        means = torch.stack([(self.sums[k] / self.counts[k]).float().to(cluster.device) for k in self.sums])
        values = dict(zip(self.sums, (cluster.sum(means) / cluster.world).tolist()))
        self.__init__()
        return values


class RunLog:
    """OUT/metrics.jsonl, the trackers, and the console. Silent on every rank but the main one."""

    def __init__(self, out: Path, cluster, total: int, start: int):
        self.cluster, self.file = cluster, out / "metrics.jsonl"
        self.started, self.first = time.time(), start
        on_terminal = sys.stderr.isatty()
        self.lines = cluster.is_main and not on_terminal
        self.bar = tqdm(total=total, initial=start, unit="img", unit_scale=True, disable=not (cluster.is_main and on_terminal))
        self.what, self.total = "", total
        if cluster.is_main:
            self._forget_after(start)

    def _forget_after(self, images: int) -> None:
        """Drop the lines of work that a resumed run will do again."""
        if self.file.exists():
            kept = [line for line in self.file.read_text().splitlines() if line and json.loads(line)["images_seen"] <= images]
            self.file.write_text("".join(line + "\n" for line in kept))

    def enter(self, what: str) -> None:
        """Say from now on what is being trained."""
        self.what = what
        self.bar.set_description(what)

    def progress(self, images: int) -> None:
        self.bar.update(images - self.bar.n)

    def write(self, images: int, values: dict[str, float]) -> None:
        if not self.cluster.is_main:
            return
        seconds = time.time() - self.started
        line = {"images_seen": images, "seconds": round(seconds, 3), "stage": self.what, **{k: float(f"{v:.6g}") for k, v in values.items()}}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.cluster.log(values, step=images)
        shown = {k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "fd", "images_per_second") or k.endswith("/loss")}
        self.bar.set_postfix(shown)
        if self.lines:
            print(f"{self.what} {images}/{self.total} img, {seconds:.0f} s: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)

    def say(self, text: str) -> None:
        if self.cluster.is_main:
            self.bar.write(text, file=sys.stderr) if not self.bar.disable else print(text, flush=True)

    def close(self) -> None:
        self.bar.close()
