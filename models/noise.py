"""Random numbers by sample.

Sample i of a run draws the same numbers whichever process, batch or microbatch it falls into, and whatever was drawn for
its neighbours. So the number of processes, the accumulation and a resume change nothing, and no generator state is saved.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """The random stream of some samples. seed, stream: 64-bit integers; samples: their numbers in the run, one each row.

    The k-th draw of a sample is a function of (seed, stream, sample, k) alone.
    """

    def __init__(self, seed: int, stream: int, samples: Sequence[int], device: torch.device | str = "cpu"):
        self.seed, self.stream, self.samples, self.device, self.draws = seed, stream, samples, torch.device(device), 0

    def _keys(self) -> list[int]:
        draw, self.draws = self.draws, self.draws + 1
        packed = (struct.pack("<4q", self.seed, self.stream, i, draw) for i in self.samples)
        return [int.from_bytes(hashlib.blake2b(p, digest_size=8).digest(), "little") for p in packed]

    def normal(self, *shape: int) -> Tensor:
        """Unit Gaussian [B, *shape], float32."""
        out = torch.empty(len(self.samples), *shape, device=self.device)
        generator = torch.Generator(self.device)
        for row, key in zip(out, self._keys()):
            row.normal_(generator=generator.manual_seed(key))
        return out

    def uniform(self) -> Tensor:
        """[B] in [0, 1), float32."""
        return torch.tensor([(key >> 40) * 2.0**-24 for key in self._keys()], device=self.device)

    def fork(self, stream: int) -> "Noise":
        """An independent stream of the same samples."""
        return Noise(self.seed, stream, self.samples, self.device)

    def __getitem__(self, rows: slice) -> "Noise":
        """The same stream for some of the rows."""
        return Noise(self.seed, self.stream, self.samples[rows], self.device)
