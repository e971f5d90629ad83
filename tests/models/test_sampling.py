"""Samplers on data whose denoiser is known in closed form: Gaussians, a point, a mixture."""

from math import cos, log2, pi, sin, sqrt

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.testing import assert_close

from models.conditioning import unconditional
from models.denoiser import Denoiser
from models.edm2_unet import EDM2UNet
from models.sampling import Guided, GuidedByCondition, ddim, ddim_step, draw, few_step, guided, heun, network_calls, noise_draws, sample
from models.schedules import EDM, CosineVP, DiscreteVP, Flow, expand

Z = torch.tensor([-1.5, -0.2, 0.4, 2.0], dtype=torch.float64).reshape(4, 1, 1, 1)
LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SCHEDULES = {"cosine": CosineVP(), "zero_snr": DiscreteVP(LINEAR, zero_terminal_snr=True), "edm": EDM(), "flow": Flow(2.0)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def with_schedule(schedule, denoise):
    """A denoiser that keeps what it was called with in `.calls`."""
    def denoiser(x_t, t, cond=None):
        denoiser.calls.append((x_t, t, cond))
        alpha, sigma = (expand(c, x_t) for c in schedule.alpha_sigma(t))
        return denoise(x_t, alpha, sigma, cond)

    denoiser.schedule, denoiser.calls = schedule, []
    return denoiser


def gaussian(schedule, m, s):
    """The exact denoiser of data N(m, s^2). m: a number, or a function of the condition."""
    def denoise(x_t, alpha, sigma, cond):
        mean = m(cond) if callable(m) else m
        return mean + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * mean)

    return with_schedule(schedule, denoise)


def mixture(schedule, means=(-1.0, 0.5), s=0.3):
    """The exact denoiser of an even mixture of N(m, s^2)."""
    def denoise(x_t, alpha, sigma, cond):
        variance = alpha**2 * s**2 + sigma**2
        shares = torch.stack([-(x_t - alpha * m) ** 2 / (2 * variance) for m in means]).softmax(0)
        return (shares * torch.stack([m + alpha * s**2 / variance * (x_t - alpha * m) for m in means])).sum(0)

    return with_schedule(schedule, denoise)


def of_classes(cond):
    """Class 0 is around -0.4, class 1 around 0.8, and no class around 0.1."""
    return torch.tensor([0.1, -0.4, 0.8], dtype=torch.float64)[cond["labels"] + 1].reshape(-1, 1, 1, 1)


def gain(t, s):
    """Of the denoiser of N(m, s^2) on the cosine schedule: the derivative of x0 by x_t."""
    return cos(pi * t / 2) * s**2 / ((cos(pi * t / 2) * s) ** 2 + sin(pi * t / 2) ** 2)


def slopes(errors):
    return [log2(a / b) for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize("steps, gain", [(1, 0.0), (2, 0.5), (4, 0.7286), (8, 0.8562), (64, 0.9809)])
def test_ddim_on_a_unit_gaussian(steps, gain):
    """DDIM in N cosine steps on N(m, 1) gives m + cos(pi / 2N)^N z."""
    found = ddim(gaussian(CosineVP(), 0.3, 1.0), Z, steps)
    assert_close(found, 0.3 + cos(pi / (2 * steps)) ** steps * Z, rtol=0, atol=1e-12)
    assert_close(found, 0.3 + gain * Z, rtol=0, atol=1e-4)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ddim_on_any_gaussian(schedule, steps):
    """DDIM on N(m, s^2) multiplies x - alpha m by (a'a s^2 + o'o) / (a^2 s^2 + o^2) at each step along the schedule's grid."""
    m, s = 0.3, 0.5
    found = ddim(gaussian(schedule, m, s), Z, steps)
    levels = [tuple(c.item() for c in schedule.alpha_sigma(t)) for t in schedule.grid(steps)]
    y = levels[0][1] * Z - levels[0][0] * m
    for (alpha, sigma), (alpha_next, sigma_next) in zip(levels, levels[1:]):
        y = y * (alpha_next * alpha * s**2 + sigma_next * sigma) / (alpha**2 * s**2 + sigma**2)
    assert_close(found, m + y, rtol=1e-9, atol=1e-9)


@every_schedule
def test_step_along_the_straight_line(schedule):
    """Given the true x0, one step keeps the noise: x_s = alpha_s x0 + sigma_s eps."""
    x0, eps = Z, Z.flip(0) + 0.1
    t, s = schedule.time(torch.tensor([0.8, 0.3], dtype=torch.float64))
    found = ddim_step(schedule, schedule.add_noise(x0, eps, t.expand(4)), x0, t, s)
    assert_close(found, schedule.add_noise(x0, eps, s.expand(4)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [CosineVP(), Flow(), EDM()], ids=["cosine", "flow", "edm"])
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_ddim_converges_at_first_order(schedule, s):
    """DDIM's error on N(m, s^2) halves with the step, against the exact end point of the ODE, m + s z from pure noise."""
    edm = isinstance(schedule, EDM)
    exact = edm_end(schedule, 0.3, s) if edm else 0.3 + s * Z
    errors = [(ddim(gaussian(schedule, 0.3, s), Z, n) - exact).abs().max().item() for n in (64, 128, 256, 512)]
    assert all(0.95 < slope < 1.05 for slope in slopes(errors)), errors


def edm_end(schedule, m, s):
    """Where the ODE takes Z on N(m, s^2): exactly to sigma_min, and from there by Euler's step to 0."""
    x = schedule.sigma_max * Z
    at_min = (x - m) * sqrt((s**2 + schedule.sigma_min**2) / (s**2 + schedule.sigma_max**2))
    return m + at_min * s**2 / (s**2 + schedule.sigma_min**2)


@pytest.mark.parametrize("s", [0.5, 1.0])
def test_heun_converges_at_second_order(s):
    """Heun's error on N(m, s^2) falls to a quarter with half the step, against the exact end point of the ODE."""
    exact = edm_end(EDM(), 0.3, s)
    errors = [(heun(gaussian(EDM(), 0.3, s), Z, n) - exact).abs().max().item() for n in (64, 128, 256, 512)]
    assert all(1.8 < slope < 2.2 for slope in slopes(errors)), errors


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (heun, 2)])
def test_order_on_a_mixture(sampler, order):
    """Where the ODE is not linear the orders are the same: differences of successive halvings shrink by 2 to the order."""
    schedule = EDM(sigma_max=20.0)
    settings = {"sigma_max": 20.0} if sampler is heun else {}
    found = [sampler(mixture(schedule), Z, n, **settings) for n in (64, 128, 256, 512)]
    assert all(abs(slope - order) < 0.2 for slope in slopes([(a - b).abs().mean().item() for a, b in zip(found, found[1:])]))


def test_heun_is_algorithm_1():
    """Heun in two steps is algorithm 1 of Karras et al. 2022 written out: predictor, corrector, and Euler at the end."""
    denoiser, (high, low) = mixture(EDM()), (80.0, 0.002)

    def slope(x, sigma):
        return (x - denoiser(x, torch.full((4,), sigma, dtype=torch.float64))) / sigma

    x0 = high * Z
    predicted = x0 + (low - high) * slope(x0, high)
    x1 = x0 + (low - high) * (slope(x0, high) + slope(predicted, low)) / 2
    assert_close(heun(denoiser, Z, 2), x1 - low * slope(x1, low), rtol=0, atol=1e-12)


def test_heun_takes_its_grid_from_its_arguments():
    """sigma_min, sigma_max and rho of the sampler make its grid, whatever those of the denoiser's schedule."""
    denoiser = gaussian(EDM(), 0.3, 0.5)
    heun(denoiser, Z, 3, sigma_min=0.1, sigma_max=10.0, rho=3.0)
    times = [t[0].item() for _, t, _ in denoiser.calls]
    grid = EDM(0.1, 10.0, 3.0).grid(3).tolist()
    assert times == pytest.approx([grid[0], grid[1], grid[1], grid[2], grid[2]], rel=1e-12)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_point_is_sampled_exactly(schedule, steps):
    """Data that is one point is hit in any number of steps, and every x_t on the way lies on the one line through it."""
    denoiser = with_schedule(schedule, lambda x_t, alpha, sigma, cond: torch.full_like(x_t, 0.7))
    assert_close(ddim(denoiser, Z, steps), torch.full_like(Z, 0.7), rtol=0, atol=1e-12)
    alpha, sigma = schedule.alpha_sigma(schedule.t_max)
    eps = Z - alpha * 0.7 / sigma
    for x_t, t, _ in denoiser.calls:
        assert_close(x_t, schedule.add_noise(torch.full_like(Z, 0.7), eps, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_heun_samples_one_point_exactly(steps):
    """Data that is one point is hit by Heun in any number of steps, one included: the last is Euler's, without 0 / 0."""
    denoiser = with_schedule(EDM(), lambda x_t, alpha, sigma, cond: torch.full_like(x_t, 0.7))
    assert_close(heun(denoiser, Z, steps), torch.full_like(Z, 0.7), rtol=0, atol=1e-12)


def test_one_step_is_the_denoiser():
    """One step of Heun or DDIM is the denoiser at pure noise."""
    denoiser = mixture(EDM())
    expected = denoiser(80 * Z, torch.full((4,), 80.0, dtype=torch.float64))
    assert_close(heun(denoiser, Z, 1), expected, rtol=0, atol=1e-12)
    assert_close(ddim(denoiser, Z, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [CosineVP(), DiscreteVP(LINEAR), Flow()], ids=["cosine", "discrete", "flow"])
def test_heun_is_for_edm(schedule):
    """Heun on a schedule that is not EDM's is refused, and the message names another sampler."""
    with pytest.raises(ValueError, match="ddim"):
        heun(gaussian(schedule, 0.0, 1.0), Z, 4)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_ddim_equals_diffusers(steps, zero_snr):
    """On DDPM's levels our DDIM gives what the trailing DDIMScheduler of diffusers gives with the same v-network."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False,
                              rescale_betas_zero_snr=zero_snr)
    scheduler.set_timesteps(steps)

    def network(x, c_noise, cond):
        return torch.tanh(2 * x) - 0.1 * expand(c_noise, x) / 1000

    x = Z
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double().expand(4), None), t, x).prev_sample
    found = ddim(Denoiser(network, DiscreteVP.from_scheduler_config(scheduler.config), "v"), Z, steps)
    assert_close(found, x.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("description", [
    {"type": "heun", "steps": 1}, {"type": "heun", "steps": 5}, {"type": "heun", "steps": 2, "guidance": 2.0},
    {"type": "ddim", "steps": 4}, {"type": "ddim", "steps": 3, "guidance": 2.0},
    {"type": "few_step", "timesteps": [80.0]}, {"type": "few_step", "timesteps": [80.0, 5.0, 0.8]},
], ids=str)
def test_network_calls(description):
    """A sampler calls its network as often as network_calls says, with as much noise as noise_draws says."""
    denoiser = gaussian(EDM(), of_classes, 0.5)
    sample(denoiser, description, [Z] * noise_draws(description), {"labels": torch.tensor([0, 1, 1, 0])})
    assert len(denoiser.calls) == network_calls(description)
    assert noise_draws(description) == len(description.get("timesteps", "1"))


def test_sample_is_the_sampler_it_names():
    """`sample` gives bit for bit what the sampler gives that a description names, with its settings."""
    denoiser, fresh = mixture(EDM()), Z.flip(0)
    assert torch.equal(sample(denoiser, {"type": "ddim", "steps": 3}, [Z]), ddim(denoiser, Z, 3))
    settings = {"steps": 3, "sigma_max": 40.0, "rho": 5.0}
    assert torch.equal(sample(denoiser, {"type": "heun", **settings}, [Z]), heun(denoiser, Z, **settings))
    found = sample(denoiser, {"type": "few_step", "timesteps": [80.0, 1.0]}, [Z, fresh])
    assert torch.equal(found, few_step(denoiser, Z, [80.0, 1.0], None, [fresh]))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 7.5])
def test_guidance_of_gaussians(guidance):
    """Guidance between N(m_0, s^2) and N(m_c, s^2) samples N(m_0 + w (m_c - m_0), s^2), in one call of twice the batch a step."""
    denoiser, labels = gaussian(CosineVP(), of_classes, 1.0), torch.tensor([0, 1, 1, 0])
    found = ddim(denoiser, Z, 8, {"labels": labels}, guidance=guidance)
    mean = 0.1 + guidance * (torch.tensor([-0.4, 0.8, 0.8, -0.4], dtype=torch.float64) - 0.1)
    assert_close(found, expand(mean, Z) + cos(pi / 16) ** 8 * Z, rtol=0, atol=1e-12)
    assert len(denoiser.calls) == 8
    for x_t, t, cond in denoiser.calls:
        assert len(x_t) == len(t) == 8 and torch.equal(x_t[:4], x_t[4:])
        assert cond["labels"].tolist() == [-1, -1, -1, -1, 0, 1, 1, 0]


def test_guidance_under_heun():
    """Guided Heun on Gaussians is Heun on the Gaussian of the guided mean."""
    cond = {"labels": torch.tensor([1, 1, 1, 1])}
    found = heun(gaussian(EDM(), of_classes, 0.5), Z, 6, cond, guidance=3.0)
    assert_close(found, heun(gaussian(EDM(), 0.1 + 3 * 0.7, 0.5), Z, 6), rtol=0, atol=1e-10)


def test_no_guidance_is_no_second_pass():
    """At guidance 1 the network is called on the batch alone and never without its condition."""
    denoiser, cond = gaussian(CosineVP(), of_classes, 1.0), {"labels": torch.tensor([0, 1, 1, 0])}
    ddim(denoiser, Z, 3, cond, guidance=1.0)
    assert guided(denoiser, 1.0) is denoiser and len(denoiser.calls) == 3
    assert all(len(x_t) == 4 and seen is cond for x_t, _, seen in denoiser.calls)


def test_given_unconditional_form():
    """An unconditional form that is handed in is the one that is used; conditions other than labels have none by themselves."""
    conds = [{"pooled": torch.full((4, 2), value)} for value in (3.0, 5.0)]
    denoiser = gaussian(CosineVP(), lambda cond: cond["pooled"][:, :1, None, None].double(), 1.0)
    found = ddim(denoiser, Z, 1, conds[0], guidance=2.0, uncond=conds[1])
    assert_close(found, torch.full_like(Z, 5 + 2 * (3 - 5)), rtol=0, atol=1e-12)
    for cond in (conds[0], None, {"labels": torch.zeros(4).long(), **conds[0]}):
        with pytest.raises(ValueError, match="uncond"):
            ddim(denoiser, Z, 1, cond, guidance=2.0)
    assert unconditional({"labels": torch.tensor([4, 0])})["labels"].tolist() == [-1, -1]


@pytest.mark.parametrize("w", [torch.tensor([1.0, 0.0, 2.5, -1.0]), torch.tensor(3.0)], ids=["per_sample", "scalar"])
def test_guidance_of_each_sample(w):
    """A strength for each sample guides that sample alone, exactly as the number does; one of 1 is the condition's own image."""
    denoiser, t, cond = gaussian(CosineVP(), of_classes, 1.0), torch.tensor([0.9, 0.2, 0.5, 0.7]), {"labels": torch.tensor([0, 1, 1, 0])}
    found = Guided(denoiser, w)(Z, t, cond)
    for i in range(4):
        one = {"labels": cond["labels"][i:i + 1]}
        assert_close(found[i:i + 1], Guided(denoiser, w.expand(4)[i].item())(Z[i:i + 1], t[i:i + 1], one), rtol=0, atol=1e-12)
    if w.ndim:
        assert_close(found[:1], denoiser(Z[:1], t[:1], {"labels": cond["labels"][:1]}), rtol=0, atol=1e-12)


def test_guidance_by_condition():
    """A strength in the condition guides a denoiser that never sees it, in one pass of twice the batch, and leaves the condition as it was."""
    denoiser, w, labels = gaussian(CosineVP(), of_classes, 1.0), torch.tensor([1.0, 0.0, 2.5, -1.0]), torch.tensor([0, 1, 1, 0])
    cond, t = {"labels": labels, "guidance": w}, torch.tensor([0.9, 0.2, 0.5, 0.7])
    found = GuidedByCondition(denoiser)(Z, t, cond)
    x_t, _, seen = denoiser.calls[0]
    assert len(denoiser.calls) == 1 and len(x_t) == 8 and set(seen) == {"labels"} and set(cond) == {"labels", "guidance"}
    assert_close(found, Guided(denoiser, w)(Z, t, {"labels": labels}), rtol=0, atol=0)
    assert GuidedByCondition(denoiser).schedule is denoiser.schedule


@every_schedule
def test_own_times(schedule):
    """DDIM on given times visits those and no others; the schedule's own grid, given, changes nothing; each starts from its first time's noise."""
    denoiser = gaussian(schedule, 0.3, 0.5)
    grid = schedule.grid(8).tolist()
    assert torch.equal(ddim(denoiser, Z, 8, times=grid), ddim(denoiser, Z, 8))
    denoiser.calls.clear()
    found = ddim(denoiser, Z, 2, times=[grid[0], grid[5], grid[8]])
    assert [t[0].item() for _, t, _ in denoiser.calls] == [grid[0], grid[5]]
    first = denoiser(schedule.noise_scale(grid[0]) * Z, torch.full((4,), grid[0], dtype=torch.float64))
    x = ddim_step(schedule, schedule.noise_scale(grid[0]) * Z, first, *torch.tensor([grid[0], grid[5]]).double())
    assert_close(found, denoiser(x, torch.full((4,), grid[5], dtype=torch.float64)), rtol=1e-6, atol=1e-6)
    assert torch.equal(sample(denoiser, {"type": "ddim", "steps": 2, "times": [grid[0], grid[5], 0.0]}, [Z]), found)


@pytest.mark.parametrize("steps", [1, 3])
def test_times_that_are_not_of_these_steps(steps):
    """A number of steps that is not that of the times is refused, and the message counts both: a student is good for its own number alone."""
    with pytest.raises(ValueError, match=f"{steps} steps want {steps + 1} times, and 3 are given"):
        ddim(gaussian(CosineVP(), 0.3, 0.5), Z, steps, times=[1.0, 0.5, 0.0])


@pytest.mark.parametrize("schedule", [CosineVP(), EDM(), DiscreteVP.cosine(64)], ids=["cosine", "edm", "discrete"])
def test_each_sample_steps_between_its_own_times(schedule):
    """ddim_step with a time for each sample is ddim_step of each sample by itself."""
    x0, t, s = Z.flip(0), schedule.grid(32)[[0, 3, 16, 31]], schedule.grid(32)[[4, 5, 30, 32]]
    found = ddim_step(schedule, Z, x0, t, s)
    for i in range(4):
        assert_close(found[i], ddim_step(schedule, Z[i:i + 1], x0[i:i + 1], t[i], s[i])[0], rtol=0, atol=1e-14)


@every_schedule
def test_one_step_generator(schedule):
    """One step is the generator at pure noise of its schedule's scale."""
    denoiser = mixture(schedule)
    t = torch.full((4,), schedule.t_max, dtype=torch.float64)
    scale = 80.0 if isinstance(schedule, EDM) else 1.0
    assert torch.equal(few_step(denoiser, Z, [schedule.t_max]), denoiser(scale * Z, t))


@every_schedule
def test_two_step_generator(schedule):
    """Two steps denoise, noise anew with what was handed in, and denoise again."""
    denoiser, fresh = mixture(schedule), Z.flip(0) - 0.3
    late = schedule.time(0.4).item()
    found = few_step(denoiser, Z, [schedule.t_max, late], generator_noise=[fresh])
    first = denoiser(schedule.noise_scale(schedule.t_max) * Z, torch.full((4,), schedule.t_max, dtype=torch.float64))
    alpha, sigma = (c.item() for c in schedule.alpha_sigma(late))
    second = denoiser(alpha * first + sigma * fresh, torch.full((4,), late, dtype=torch.float64))
    assert_close(found, second, rtol=0, atol=1e-12)


def test_each_step_has_its_own_noise():
    """Each later step takes the next noise that was handed in, and the generator sees x0's own noise level."""
    noises = [Z + 0.1, Z - 0.2, Z * 2]
    denoiser = with_schedule(EDM(), lambda x_t, alpha, sigma, cond: torch.zeros_like(x_t))
    few_step(denoiser, Z, [80.0, 10.0, 2.0, 0.5], generator_noise=noises)
    for (x_t, t, _), sigma, eps in zip(denoiser.calls, (80.0, 10.0, 2.0, 0.5), [Z, *noises], strict=True):
        assert_close(x_t, sigma * eps, rtol=1e-12, atol=0)
        assert t.tolist() == [sigma] * 4


def test_moments_of_two_steps():
    """Two steps of a Gaussian's exact denoiser give the mean and variance of the two linear maps, within 4 standard errors."""
    m, s, t = 0.3, 0.5, 0.6
    z, fresh = torch.randn(2, 20_000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = few_step(gaussian(CosineVP(), m, s), z, [0.8, t], generator_noise=[fresh])
    (a0, k0), (a1, k1) = ((cos(pi * time / 2), gain(time, s)) for time in (0.8, t))
    mean = m + k1 * a1 * (-k0 * a0 * m)
    variance = k1**2 * (a1**2 * k0**2 + sin(pi * t / 2) ** 2)
    assert abs(x.mean() - mean) < 4 * sqrt(variance / len(x))
    assert abs(x.var() - variance) < 4 * variance * sqrt(2 / len(x))


@pytest.mark.parametrize("timesteps", [[80.0, 1.0], [80.0, 5.0, 1.0]])
def test_missing_noise(timesteps):
    """More than one step without fresh noise is refused, and the message names the argument."""
    with pytest.raises(ValueError, match="generator_noise"):
        few_step(mixture(EDM()), Z, timesteps)


def test_torch_generator():
    """A torch.Generator serves as fresh noise, drawn in order: its seed gives the same images again, and another seed others."""
    denoiser, timesteps = mixture(EDM()), [80.0, 5.0, 1.0]
    sources = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, again, other = (few_step(denoiser, Z, timesteps, generator_noise=source) for source in sources)
    assert torch.equal(one, again) and (one - other).abs().max() > 1e-3
    source = torch.Generator().manual_seed(1)
    drawn = [torch.randn(Z.shape, dtype=torch.float64, generator=source) for _ in range(2)]
    assert torch.equal(few_step(denoiser, Z, timesteps, generator_noise=drawn), one)


def test_gradient_flows_through_every_step():
    """The gradient of a few-step image by the first latents is the product of all its steps' gains."""
    z, s = Z.clone().requires_grad_(), 0.5
    x = few_step(gaussian(CosineVP(), 0.3, s), z, [0.9, 0.5, 0.2], generator_noise=[Z, Z])
    gradient, = torch.autograd.grad(x.sum(), z)
    product = gain(0.9, s) * cos(pi / 4) * gain(0.5, s) * cos(pi / 10) * gain(0.2, s)
    assert_close(gradient, torch.full_like(z, product), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sampler", [
    {"type": "ddim", "steps": 3}, {"type": "heun", "steps": 3}, {"type": "few_step", "timesteps": [80.0, 1.0]},
], ids=["ddim", "heun", "few_step"])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_kept(sampler, given):
    """Samplers work in the latents' precision, at least float32, at every call of the network and in the result."""
    denoiser, kept = mixture(EDM()), torch.promote_types(given, torch.float32)
    assert sample(denoiser, sampler, [Z.to(given)] * noise_draws(sampler)).dtype == kept
    assert all(x_t.dtype == t.dtype == kept for x_t, t, _ in denoiser.calls)


class Pointwise(nn.Module):
    """A network of which nothing depends on the batch, not even the last bit."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.1, -0.4, 0.8]))

    def forward(self, x, c_noise, cond):
        return torch.tanh(x + expand(self.shift[cond["labels"]] + c_noise, x))


@pytest.mark.parametrize("sampler", [
    {"type": "ddim", "steps": 3}, {"type": "few_step", "timesteps": [80.0, 1.0]},
], ids=["ddim", "few_step"])
def test_draw_by_number(sampler):
    """Image number i is the same bit for bit whatever the batch size and whatever is drawn with it, but for the seed."""
    denoiser = Denoiser(Pointwise(), EDM(), "edm").requires_grad_(False)
    description = {"channels": 2, "resolution": 4, "classes": 3, "sampler": sampler}
    images, labels = draw(denoiser, description, range(10), 10)
    assert labels.tolist() == [i % 3 for i in range(10)]
    for batch in (1, 3, 7):
        again, same = draw(denoiser, description, range(10), batch)
        assert torch.equal(again, images) and torch.equal(same, labels)
    part, theirs = draw(denoiser, description, range(4, 9), 2)
    assert torch.equal(part, images[4:9]) and torch.equal(theirs, labels[4:9])
    assert images.flatten(1).unique(dim=0).shape[0] == 10 and images.abs().max() <= 1
    other, _ = draw(denoiser, description, range(10), 10, seed=1)
    assert not torch.isclose(other, images).all((1, 2, 3)).any()


def test_draw_given_labels():
    """Labels that are handed in are those that are drawn, each with its own number's noise."""
    denoiser = Denoiser(Pointwise(), EDM(), "edm").requires_grad_(False)
    description = {"channels": 2, "resolution": 4, "classes": 3, "sampler": {"type": "heun", "steps": 2}}
    images, labels = draw(denoiser, description, range(6), 6)
    given = torch.tensor([0, 1, 2, 2, 2, 2])
    found, same = draw(denoiser, description, range(6), 4, labels=given)
    assert torch.equal(same, given)
    assert [torch.equal(a, b) for a, b in zip(found, images)] == (given == labels).tolist()


def test_draw_from_a_network():
    """The EDM2 network draws the same images in any batch size, to rounding, and without labels where it has no classes."""
    torch.manual_seed(0)
    net = EDM2UNet(8, 1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    net.out_gain.data.fill_(1.0)
    denoiser = Denoiser(net, EDM(), "edm").eval()
    description = {"channels": 1, "resolution": 8, "classes": 0, "sampler": {"type": "heun", "steps": 3}}
    images, labels = draw(denoiser, description, range(6), 6)
    assert labels is None and not images.requires_grad
    assert_close(draw(denoiser, description, range(6), 2)[0], images, rtol=0, atol=1e-4)
