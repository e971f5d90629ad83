"""The discriminator's head: what its verdict depends on, and that it can learn."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models.discriminator import DiscriminatorHead

RESOLUTIONS = [1, 2, 4, 8, 16]


def head(channels, resolution, seed=0):
    torch.manual_seed(seed)
    return DiscriminatorHead(channels, resolution)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_sees_every_feature(resolution):
    """The one logit of a sample depends on every channel and every pixel of its features."""
    disc, x = head(128, resolution), torch.randn(2, 128, resolution, resolution, requires_grad=True)
    logits = disc(x)
    assert logits.shape == (2,)
    gradient, = torch.autograd.grad(logits[0], x)
    assert (gradient[0] != 0).all() and (gradient[1] == 0).all()


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_samples_are_independent(resolution):
    """A sample's logit is that of the sample alone, whatever shares its batch."""
    disc, x = head(32, resolution), torch.randn(3, 32, resolution, resolution)
    assert_close(disc(x), torch.cat([disc(sample[None]) for sample in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 32, 64, 128, 768])
def test_no_sample_is_starved_of_gradient(channels):
    """The typical sample's features get as much gradient as the average one's: at initialization no layer is saturated."""
    disc = head(channels, 4)
    x = torch.randn(64, channels, 4, 4, requires_grad=True)
    gradient, = torch.autograd.grad(disc(x).sum(), x)
    norms = gradient.flatten(1).norm(dim=1)
    assert norms.median() > 0.5 * norms.mean()


def test_half_precision_features():
    """Features in bfloat16 are judged in the head's own precision, and the verdict is float32."""
    disc, x = head(32, 4), torch.randn(4, 32, 4, 4).bfloat16()
    assert disc(x).dtype == torch.float32
    assert torch.equal(disc(x), disc(x.float()))


def test_learns_to_tell():
    """Trained on -log D(real) - log(1 - D(fake)), it tells features apart that differ in their mean."""
    disc, generator = head(128, 4), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(disc.parameters(), lr=1e-3)
    shift = 0.3 * torch.randn(128, 4, 4, generator=generator)
    for _ in range(80):
        fake, real = torch.randn(2, 16, 128, 4, 4, generator=generator)
        loss = (F.softplus(-disc(real + shift)) + F.softplus(disc(fake))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fake, real = torch.randn(2, 64, 128, 4, 4, generator=generator)
    right = torch.cat([disc(real + shift) > 0, disc(fake) < 0])
    assert right.float().mean() > 0.95


def test_config_makes_the_same_head():
    """A head built from another's configuration takes its weights and gives its verdict bit for bit."""
    disc, x = head(32, 8), torch.randn(2, 32, 8, 8)
    again = DiscriminatorHead(**disc.config)
    again.load_state_dict(disc.state_dict())
    assert torch.equal(again(x), disc(x))
