"""Random numbers by sample: what they depend on, and what they do not."""

import itertools
import math

import pytest
import torch

from models.noise import Noise


def draws(seed=1, stream=2, samples=range(12)):
    noise = Noise(seed, stream, samples)
    return noise.normal(3, 4, 4), noise.uniform(), noise.normal()


@pytest.mark.parametrize("size", [1, 5, 12])
def test_batching_changes_nothing(size):
    """A sample draws the same numbers bit for bit in any batch of any size, in any order of neighbours."""
    whole = draws()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    parts = [draws(samples=order[i:i + size]) for i in range(0, 12, size)]
    for k, numbers in enumerate(whole):
        assert torch.equal(torch.cat([part[k] for part in parts]), numbers[order])


def test_slicing_changes_nothing():
    """Rows of a stream draw what they draw in the whole of it."""
    noise = Noise(1, 2, range(12))
    microbatches = [noise[i:i + 4] for i in range(0, 12, 4)]
    for draw in (lambda n: n.normal(2, 3), lambda n: n.uniform()):
        assert torch.equal(torch.cat([draw(part) for part in microbatches]), draw(noise))


def test_neighbours_draws_change_nothing():
    """The k-th draw depends on k, and not on the shapes or kinds of the draws before it."""
    one, other = Noise(1, 2, [7]), Noise(1, 2, [7])
    one.normal(5), other.uniform()
    assert torch.equal(one.normal(3), other.normal(3))


def test_everything_else_changes_them():
    """Another seed, stream, sample or draw gives other numbers."""
    noise = Noise(1, 2, [3, 4])
    others = [Noise(seed, stream, [3]).normal(8)[0] for seed, stream in ((2, 2), (1, 3), (2, 1))]
    rows = [*noise.normal(8), *noise.normal(8), *others]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(rows, 2))


def test_fork_is_the_other_stream_of_the_same_samples():
    """A fork draws as if it had been made with its stream number, whatever its origin has drawn."""
    noise = Noise(1, 2, range(3))
    noise.normal(4)
    assert torch.equal(noise.fork(9).normal(4), Noise(1, 9, range(3)).normal(4))


@pytest.mark.parametrize("shape", [(), (3, 4, 4)])
def test_normal_is_normal_across_samples(shape):
    """Over samples the mean is 0, the variance 1 and the fourth moment 3, within 4 standard errors."""
    x = Noise(0, 0, range(4000)).normal(*shape).double()
    assert abs(x.mean()) < 4 / math.sqrt(x.numel())
    assert abs(x.square().mean() - 1) < 4 * math.sqrt(2 / x.numel())
    assert abs(x.pow(4).mean() - 3) < 4 * math.sqrt(96 / x.numel())


@pytest.mark.parametrize("other", [dict(stream=3), dict(seed=2), dict(samples=range(1, 4001))])
def test_streams_are_uncorrelated(other):
    """Streams, seeds and neighbouring samples are uncorrelated, within 4 standard errors."""
    settings = dict(seed=1, stream=2, samples=range(4000))
    a, b = Noise(**settings).normal(4), Noise(**(settings | other)).normal(4)
    assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_uniform_ends(monkeypatch):
    """Uniform numbers lie in [0, 1): 0 can be drawn, and the largest hash there is stays below 1 in float32."""
    monkeypatch.setattr(Noise, "_keys", lambda self: [0, 2**64 - 1])
    low, high = Noise(0, 0, range(2)).uniform()
    assert low == 0 and 0.9999999 < high < 1


def test_uniform():
    """Uniform numbers have mean 1/2 and an even share in each tenth, within 4 standard errors."""
    u = Noise(0, 0, range(20_000)).uniform()
    assert u.dtype == torch.float32
    assert abs(u.double().mean() - 0.5) < 4 / math.sqrt(12 * len(u))
    assert (torch.histc(u, 10, 0, 1) - 2000).abs().max() < 4 * math.sqrt(20_000 * 0.09)
