"""Noise schedules: their closed forms, and agreement with the tables and grids of diffusers."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from models.schedules import EDM, CosineVP, DiscreteVP, Flow, expand

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
VP = {"cosine": CosineVP(), "clipped": CosineVP(20.0), "discrete": DiscreteVP(LINEAR),
      "zero_snr": DiscreteVP(LINEAR, zero_terminal_snr=True)}
ALL = {**VP, "edm": EDM(), "flow": Flow(), "shifted": Flow(3.0)}
every_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
BETAS = {
    "linear": {},
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"),
    "trained_betas": dict(trained_betas=[0.05, 0.1, 0.3, 0.2], num_train_timesteps=4),
}


@pytest.mark.parametrize("schedule", VP.values(), ids=VP)
def test_variance_is_preserved(schedule):
    """alpha^2 + sigma^2 = 1 at every time of a VP schedule."""
    alpha, sigma = schedule.alpha_sigma(torch.linspace(0, schedule.t_max, 1001, dtype=torch.float64))
    assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)


@every_schedule
def test_snr_falls_with_time(schedule):
    """alpha / sigma falls strictly from data to noise."""
    times = torch.linspace(0, schedule.t_max, 501, dtype=torch.float64)[1:]
    alpha, sigma = schedule.alpha_sigma(times)
    assert ((alpha / sigma).diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_cosine_ends(dtype):
    """The unclipped cosine has alpha(1) == 0 and sigma(0) == 0 exactly, and alpha(0) == sigma(1) == 1."""
    alpha, sigma = CosineVP().alpha_sigma(torch.tensor([0.0, 1.0], dtype=dtype))
    assert alpha.tolist() == [1.0, 0.0] and sigma.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("logsnr_max", [6.0, 20.0])
def test_clipped_cosine(logsnr_max):
    """The clipped cosine's log-SNR is +-logsnr_max at the ends, 0 in the middle, and -2 log tan of a linear angle between."""
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    alpha, sigma = CosineVP(logsnr_max).alpha_sigma(t)
    low, high = math.atan(math.exp(-logsnr_max / 2)), math.atan(math.exp(logsnr_max / 2))
    logsnr = 2 * (alpha / sigma).log()
    assert_close(logsnr, -2 * torch.tan(low + (high - low) * t).log(), rtol=0, atol=1e-9)
    assert_close(logsnr[[0, 20, 40]], torch.tensor([logsnr_max, 0.0, -logsnr_max], dtype=torch.float64), rtol=0, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("n", [1, 2, 5, 18])
def test_grid(schedule, n):
    """A grid holds n + 1 strictly falling float64 times, the first t_max and the last 0."""
    grid = schedule.grid(n)
    assert grid.shape == (n + 1,) and grid.dtype == torch.float64 and (grid.diff() < 0).all()
    assert grid[0].item() == pytest.approx(schedule.t_max, rel=1e-12) and grid[-1].item() == 0


@pytest.mark.parametrize("n", [2, 18, 32])
def test_edm_grid(n):
    """The EDM grid is equation 5 of Karras et al. 2022, and 0 after it."""
    low, high, rho = 0.01, 50.0, 5.0
    expected = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    assert_close(EDM(low, high, rho).grid(n), torch.tensor([*expected, 0.0], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("settings", BETAS.values(), ids=BETAS)
def test_discrete_equals_diffusers(settings, zero_snr):
    """alpha^2 is diffusers' alphas_cumprod (float32 there) for every beta schedule, with and without zero terminal SNR."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=zero_snr, **settings)
    schedule = DiscreteVP.from_scheduler_config(scheduler.config)
    times = torch.arange(1, schedule.t_max + 1, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(times)
    expected = scheduler.alphas_cumprod.double()
    assert_close(alpha**2, expected, rtol=2e-5, atol=1e-6)
    assert_close(sigma**2, 1 - expected, rtol=2e-5, atol=1e-6)
    assert schedule.t_max == len(expected) and (alpha[-1] == 0) == zero_snr
    assert_close(schedule.conditioning(times), times - 1)


@pytest.mark.parametrize("name", ["sigmoid", "laplace", "cosine"])
def test_unknown_beta_schedule(name):
    """A beta schedule that cannot be represented is refused by name."""
    with pytest.raises(ValueError, match=name):
        DiscreteVP.from_scheduler_config({"num_train_timesteps": 1000, "beta_schedule": name})


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 10, 16, 18, 20, 25, 50, 64, 100, 250, 500, 1000])
def test_discrete_grid_is_trailing(n):
    """The discrete grid is the timestep_spacing="trailing" of diffusers, counted from 1."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    assert DiscreteVP(scheduler.betas).grid(n).tolist() == [*(scheduler.timesteps + 1).tolist(), 0]


def test_discrete_time_is_uniform():
    """Uniform u gives each of the T levels the same share, u = 0 the first and u = 1 the last."""
    schedule = DiscreteVP(LINEAR)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert torch.bincount(schedule.time(u).long(), minlength=1001).tolist() == [0] + [10] * 1000
    assert schedule.time(0.0).item() == 1 and schedule.time(1.0).item() == 1000


def test_edm_time():
    """sigma^(1 / rho) is linear in the quantile, from sigma_min at 0 to sigma_max at 1."""
    u = torch.linspace(0, 1, 21, dtype=torch.float64)
    root = EDM().time(u) ** (1 / 7)
    assert_close(root, 0.002 ** (1 / 7) * (1 - u) + 80 ** (1 / 7) * u, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_time(shift):
    """A shift multiplies the odds t / (1 - t) of the quantile, and keeps both ends."""
    u = torch.linspace(0, 1, 41, dtype=torch.float64)
    t = Flow(shift).time(u)
    assert t[0] == 0 and t[-1] == 1
    assert_close((t / (1 - t))[1:-1], shift * (u / (1 - u))[1:-1], rtol=1e-10, atol=0)


@every_schedule
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_kept(schedule, given):
    """Tensors stay float64 or float32 in every method, and nothing is computed in less than float32."""
    u, kept = torch.tensor([0.25, 1.0], dtype=given), torch.promote_types(given, torch.float32)
    t = schedule.time(u)
    assert [x.dtype for x in (t, *schedule.alpha_sigma(t), schedule.conditioning(t), schedule.noise_scale(t))] == [kept] * 5
    images = torch.ones(2, 1, 2, 2, dtype=kept)
    assert schedule.add_noise(images, images, t).dtype == kept


@every_schedule
def test_host_values_are_float64(schedule):
    """Python numbers become float64, and equal the same times given as tensors."""
    for value in (schedule.t_max, schedule.time(0.5).item()):
        on_host, on_tensor = schedule.alpha_sigma(value), schedule.alpha_sigma(torch.tensor([value], dtype=torch.float64))
        assert all(a.dtype == torch.float64 and a == b for a, b in zip(on_host, on_tensor))


@every_schedule
def test_add_noise(schedule):
    """x_t = alpha_t x0 + sigma_t eps, each sample at its own time."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator)
    t = schedule.time(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    for i, x_t in enumerate(schedule.add_noise(x0, eps, t)):
        alpha, sigma = schedule.alpha_sigma(t[i].item())
        assert_close(x_t, alpha * x0[i] + sigma * eps[i], rtol=0, atol=1e-14)


@every_schedule
def test_noise_scale_is_that_of_pure_noise(schedule):
    """A sampler starts at t_max from noise of standard deviation sigma(t_max), to within what little data is left there."""
    _, sigma = schedule.alpha_sigma(schedule.t_max)
    assert schedule.noise_scale(schedule.t_max).item() == pytest.approx(sigma.item(), rel=1e-4)


@every_schedule
def test_config_makes_the_same_schedule(schedule):
    """A schedule made anew from its configuration, through JSON, has the same values bit for bit."""
    again = type(schedule)(**json.loads(json.dumps(schedule.config())))
    u = torch.linspace(0, 1, 33, dtype=torch.float64)
    t = schedule.time(u)
    assert torch.equal(again.grid(7), schedule.grid(7)) and torch.equal(again.time(u), t)
    assert all(torch.equal(a, b) for a, b in zip(again.alpha_sigma(t), schedule.alpha_sigma(t)))


def test_expand():
    """A coefficient a sample multiplies the whole of that sample, and a single one multiplies all."""
    x = torch.ones(3, 2, 4, 4)
    assert (expand(torch.tensor([1.0, 2.0, 3.0]), x) * x).flatten(1).unique(dim=1).flatten().tolist() == [1.0, 2.0, 3.0]
    assert (expand(torch.tensor(2.0), x) * x).unique().tolist() == [2.0]


@pytest.mark.parametrize("levels", [1, 2, 64, 1000, 8192])
def test_discrete_cosine(levels):
    """DiscreteVP.cosine is the exact cosine at its levels, zero signal at the last, through betas in [0, 1] that diffusers can take."""
    schedule, times = DiscreteVP.cosine(levels), torch.arange(levels + 1, dtype=torch.float64)
    for found, expected in zip(schedule.alpha_sigma(times), CosineVP().alpha_sigma(times / levels)):
        assert_close(found, expected, rtol=0, atol=1e-9)
    assert schedule.alpha_sigma(schedule.t_max)[0] == 0 and len(schedule.betas) == levels
    assert (schedule.betas > 0).all() and (schedule.betas <= 1).all() and schedule.betas[-1] == 1


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_angle_finds_the_time(schedule, dtype):
    """at_angle undoes a time's atan2(sigma, alpha), at and between the times that a network has seen, to the precision of the angle."""
    u = torch.linspace(0.01, 1, 200, dtype=torch.float64)
    times = (u * schedule.t_max if isinstance(schedule, DiscreteVP) else schedule.time(u)).to(dtype)
    alpha, sigma = (c.to(dtype) for c in schedule.alpha_sigma(times.double()))
    found = schedule.at_angle(torch.atan2(sigma, alpha))
    assert found.dtype == dtype
    error = [abs(a - b) for a, b in zip(schedule.alpha_sigma(found.double()), schedule.alpha_sigma(times.double()))]
    if isinstance(schedule, EDM):
        assert_close(found, times, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=0)
    else:
        assert max(e.max() for e in error) < (1e-6 if dtype == torch.float32 else 1e-9)


@every_schedule
def test_at_angle_stays_where_a_network_was_trained(schedule):
    """Cleaner or noisier than a schedule's ends, an angle gives the end: never level 0 of a discrete one, nor sigma 0 or infinity of EDM's."""
    for dtype in (torch.float32, torch.float64):
        clean, noisy = schedule.at_angle(torch.tensor([0.0, math.pi / 2], dtype=dtype)).tolist()
        assert noisy == pytest.approx(schedule.t_max, rel=1e-6)
        first = {DiscreteVP: 1.0, EDM: 0.002}.get(type(schedule), 0.0)
        assert clean == pytest.approx(first, abs=1e-6)
