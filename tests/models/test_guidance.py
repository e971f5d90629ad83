"""Guidance by the network itself, and by a weaker one."""

import torch

from models.sampling import guided, heun
from models.schedules import EDM


class Gaussian:
    """The exact denoiser of N(m, s^2), whose condition may shift m."""

    def __init__(self, m, s=0.5):
        self.m, self.s, self.schedule, self.calls = m, s, EDM(), 0

    def __call__(self, x_t, t, cond):
        self.calls += 1
        t = t.view(-1, *[1] * (x_t.ndim - 1))
        return (self.s**2 * x_t + t**2 * self.m) / (self.s**2 + t**2)


def test_autoguidance_overshoots_the_weaker_model_by_the_known_amount():
    """Two Gaussians of one width: sampling ends around m_guide + w (m - m_guide), and each network is called once a pass."""
    strong, weak = Gaussian(1.0), Gaussian(0.4)
    latents = torch.randn(2000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = heun(strong, latents, 32, guidance=2.0, guide=weak)
    reference = heun(Gaussian(0.4 + 2 * 0.6), latents, 32)
    assert torch.allclose(x, reference, atol=1e-9)
    assert strong.calls == weak.calls == 63


def test_weight_one_makes_no_call_of_the_guide():
    """w = 1 is no guidance, and costs none."""
    strong, weak = Gaussian(1.0), Gaussian(0.4)
    assert guided(strong, 1.0, guide=weak) is strong and weak.calls == 0
