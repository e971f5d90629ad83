"""Losses against closed forms. Expectations over Gaussians are quadratures, exact to rounding, unless a test says "sampled"."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from models.denoiser import Denoiser, from_x0
from models.edm2_unet import EDM2UNet
from models.sampling import ddim_step
from models.schedules import EDM, CosineVP, DiscreteVP, Flow
from trainers.losses import (WEIGHTS, denoising_loss, dmd_gradient, dmd_loss, edm2_loss, edm_weight, gan_discriminator_loss,
                             gan_generator_loss, per_sample, progressive_target, progressive_weight, regression_loss)

LEVELS = [(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)) for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
MEAN = torch.tensor([0.3, -0.7], dtype=torch.float64)
COV = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)


def gauss_hermite(dim, nodes=2):
    """Points [n, dim] and weights [n] of a unit Gaussian: exact for polynomials of degree 2 * nodes - 1 in each variable."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    w = w / w.sum()
    return torch.cartesian_prod(*[x] * dim).view(-1, dim), torch.cartesian_prod(*[w] * dim).view(-1, dim).prod(1)


def gaussian_x0(x_t, mean, cov, alpha, sigma):
    """E[x0 | x_t] of N(mean, cov)."""
    C = alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=cov.dtype)
    return mean + (x_t - alpha * mean) @ torch.linalg.solve(C, alpha * cov)


def square_root(cov):
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ values.sqrt().diag() @ vectors.T


def matching_objective(A, b, alpha, sigma, normalised=True):
    """The DMD surrogate of G(z) = A z + b on N(MEAN, COV), with the exact score of the generator's own distribution."""
    points, weights = gauss_hermite(4)
    z, eps = points[:, :2], points[:, 2:]
    x = z @ A.T + b
    x_t = (alpha * x + sigma * eps).detach()
    x0_real, x0_fake = gaussian_x0(x_t, MEAN, COV, alpha, sigma), gaussian_x0(x_t, b.detach(), (A @ A.T).detach(), alpha, sigma)
    gradient = dmd_gradient(x, x0_real, x0_fake)
    if not normalised:  # back to alpha (s_fake - s_real)
        gradient = gradient * (x.detach() - x0_real).abs().mean(1, keepdim=True) * alpha**2 / sigma**2
    return (weights * dmd_loss(x, gradient)).sum() * x.shape[1]


def descend(A, b, objective, steps=150, lr=0.3):
    A, b = A.clone().requires_grad_(), b.clone().requires_grad_()
    optimizer = torch.optim.SGD([A, b], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(A, b).backward()
        optimizer.step()
    return A.detach(), b.detach()


# --- denoising -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_untrained_edm2_network_has_loss_one_at_every_noise_level(sigma):
    """Sampled: a zero-output network is the best denoiser of N(0, sigma_data^2), and its loss with u = 0 is 1 within 4 SE."""
    torch.manual_seed(0)
    unet = EDM2UNet(4, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8)
    denoiser = Denoiser(unet, EDM(), "edm")
    x0, sigmas = 0.5 * torch.randn(1024, 1, 4, 4), torch.full((1024,), sigma)
    with torch.no_grad():
        x0_pred = denoiser(x0 + sigma * torch.randn_like(x0), sigmas)
    loss = edm2_loss(x0_pred, x0, sigmas, torch.zeros(1024), sigma_data=0.5)
    assert abs(loss.mean() - 1) < 4 * loss.std() / 1024**0.5


def test_best_logvar_is_log_of_loss():
    """edm2_loss is stationary and least at u = log of the weighted loss, where it is 1 + u."""
    torch.manual_seed(0)
    x0, x0_pred = torch.randn(2, 50, 3, dtype=torch.float64)
    sigma = torch.rand(50, dtype=torch.float64) + 0.1
    best = denoising_loss(x0_pred, x0, edm_weight(sigma, 0.5)).mean().log()
    u = best.clone().requires_grad_()
    loss = edm2_loss(x0_pred, x0, sigma, u.expand(50), 0.5).mean()
    loss.backward()
    assert abs(u.grad) < 1e-12 and torch.isclose(loss, 1 + best, rtol=1e-12)
    for step in (-0.1, 0.1):
        assert edm2_loss(x0_pred, x0, sigma, (best + step).expand(50), 0.5).mean() > loss


def test_edm_weight_cancels_output_scale():
    """lambda(sigma) c_out(sigma)^2 = 1."""
    sigma = torch.logspace(-3, 2, 20, dtype=torch.float64)
    c_out = sigma * 0.7 / (sigma**2 + 0.7**2).sqrt()
    torch.testing.assert_close(edm_weight(sigma, 0.7) * c_out**2, torch.ones_like(sigma), rtol=1e-12, atol=0)


def test_snr_weight_makes_error_of_noise():
    """denoising_loss with weight alpha^2 / sigma^2 is the squared error of eps."""
    torch.manual_seed(0)
    x0, x0_pred, eps = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    alpha, sigma = torch.rand(2, 5, dtype=torch.float64) + 0.1
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    eps_pred = (a * x0 + s * eps - a * x0_pred) / s
    found = denoising_loss(x0_pred, x0, (alpha / sigma) ** 2)
    torch.testing.assert_close(found, per_sample((eps_pred - eps).square()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.5), (0.8, 0.6), (0.1, 0.99)])
def test_perfect_denoiser_of_a_mixture_reaches_its_conditional_variance(alpha, sigma):
    """For a Gaussian mixture the loss of E[x|x_t] is E Var(x|x_t), and its gradient along any perturbation is zero."""
    share, mean, std = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5]))
    grid = torch.linspace(-8, 8, 641, dtype=torch.float64)
    dx = grid[1] - grid[0]

    def normal(x, m, s):
        return torch.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))

    total = (alpha**2 * std**2 + sigma**2).sqrt()
    joint_k = share * normal(grid[:, None], alpha * mean, total)  # [x_t, component]
    slope = alpha * std**2 / total**2
    component_x0 = mean + slope * (grid[:, None] - alpha * mean)
    component_var = std**2 * sigma**2 / total**2
    p_t = joint_k.sum(1)
    r = joint_k / p_t[:, None].clamp_min(1e-300)
    x0_best = (r * component_x0).sum(1)
    variance = (r * (component_var + component_x0**2)).sum(1) - x0_best**2

    p_x0 = (share * normal(grid[:, None], mean, std)).sum(1)
    joint = p_x0[None] * normal(grid[:, None], alpha * grid[None], sigma) * dx**2  # [x_t, x0]
    c = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    x0_pred = x0_best + sum(c[k] * (grid / 4) ** k for k in range(4))
    every = denoising_loss(x0_pred.repeat_interleave(len(grid))[:, None], grid.repeat(len(grid))[:, None])
    loss = (joint.flatten() * every).sum()
    loss.backward()
    assert torch.isclose(loss, (p_t * variance).sum() * dx, rtol=1e-8)
    assert c.grad.abs().max() < 1e-8


# --- progressive distillation ----------------------------------------------------------------------------------------------

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
LADDERS = {"cosine": CosineVP(), "clipped": CosineVP(20.0), "linear": DiscreteVP(LINEAR), "zero_snr": DiscreteVP(LINEAR, zero_terminal_snr=True),
           "discrete_cosine": DiscreteVP.cosine(8192), "edm": EDM(), "flow": Flow(3.0)}
every_ladder = pytest.mark.parametrize("schedule", LADDERS.values(), ids=LADDERS)


def pairs_of_steps(schedule, n):
    """(times, levels) at t, mid and s of the n steps of a student, from a teacher's 2n; and what a teacher might say at t and mid, with z_t."""
    grid = schedule.grid(2 * n)
    times = grid[:-1:2], grid[1::2], grid[2::2]
    torch.manual_seed(0)
    return times, [schedule.alpha_sigma(t) for t in times], torch.randn(3, n, 1, 2, 2, dtype=torch.float64)


@every_ladder
@pytest.mark.parametrize("n", [1, 4, 500])
def test_one_step_lands_where_two_land(schedule, n):
    """From any z_t, one DDIM step through progressive_target is two through x1 and x2, at every step of the grid: the first from pure noise."""
    (t, mid, s), levels, (z, x1, x2) = pairs_of_steps(schedule, n)
    two = ddim_step(schedule, ddim_step(schedule, z, x1, t, mid), x2, mid, s)
    torch.testing.assert_close(ddim_step(schedule, z, progressive_target(x1, x2, *levels), t, s), two, rtol=0, atol=1e-13)


@every_ladder
@pytest.mark.parametrize("n", [1, 4, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_progressive_target_is_between_the_two(schedule, n, dtype):
    """Each element lies between x1 and x2, to rounding; at the last step, where no noise is left, it is x2 to the last bit."""
    _, levels, (_, x1, x2) = pairs_of_steps(schedule, n)
    x1, x2 = x1.to(dtype), x2.to(dtype)
    found, rounding = progressive_target(x1, x2, *levels), 4 * torch.finfo(dtype).eps
    assert found.dtype == dtype and (found >= torch.minimum(x1, x2) - rounding).all() and (found <= torch.maximum(x1, x2) + rounding).all()
    assert torch.equal(found[-1], x2[-1]) == (levels[2][1][-1] == 0).item()
    assert not torch.equal(found[0], x2[0]) or n == 1  # the classic mistake: the second step's x0 as it is


@pytest.mark.parametrize("n", [8, 64, 4096])
@pytest.mark.parametrize("name", ["cosine", "discrete_cosine", "edm", "flow"])
def test_progressive_target_needs_no_float64_images(name, n):
    """With float32 images, and bfloat16 ones of the same values, it is within 1e-6 of float64, at any number of steps."""
    _, levels, (_, x1, x2) = pairs_of_steps(LADDERS[name], n)
    x1, x2 = x1.bfloat16(), x2.bfloat16()
    exact = progressive_target(x1.double(), x2.double(), *levels)
    for kind in (x1, x1.float()):
        found = progressive_target(kind, x2, *levels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


@every_ladder
def test_four_steps_pair_by_pair(schedule):
    """Four steps put together pair by pair land where four DDIM steps land, and are the sum of (rho_k+1 - rho_k) x_k over rho_4 - rho_0."""
    grid = schedule.grid(20)
    times = torch.stack([grid[k:len(grid) - 4 + k:4] for k in range(5)])  # [5, 5]: k, and the student's step
    torch.manual_seed(1)
    z, *xs = torch.randn(5, 5, 1, 2, 2, dtype=torch.float64)
    at, target, where = [schedule.alpha_sigma(t) for t in times], None, z
    for k, x in enumerate(xs):
        target = x if k == 0 else progressive_target(target, x, at[0], at[k], at[k + 1])
        where = ddim_step(schedule, where, x, times[k], times[k + 1])
    torch.testing.assert_close(ddim_step(schedule, z, target, times[0], times[4]), where, rtol=0, atol=1e-13)
    rho = torch.stack([alpha / sigma for alpha, sigma in at])[:, :-1]  # infinite at the end of the last
    shares = (rho.diff(dim=0) / (rho[4] - rho[0])).view(4, 4, 1, 1, 1)
    torch.testing.assert_close(target[:-1], (shares * torch.stack(xs)[:, :-1]).sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, at_noise, at_half, at_data", [
    ("snr_trunc", 1, 1, 3), ("snr", 0, 1 / 3, 3), ("snr_plus_one", 1, 4 / 3, 4), ("constant", 1, 1, 1),
])
def test_progressive_weights(kind, at_noise, at_half, at_data):
    """SNR 0, 1/3 and 3: cut off from below at 1, never from above; plain it is 0 at pure noise; plus one it is 1 / sigma^2."""
    sigma = torch.tensor([1.0, 0.75**0.5, 0.5], dtype=torch.float64)
    alpha = torch.tensor([0.0, 0.5, 0.75**0.5], dtype=torch.float64)
    expected = torch.tensor([at_noise, at_half, at_data], dtype=torch.float64)
    torch.testing.assert_close(progressive_weight(alpha, sigma, kind), expected, rtol=1e-12, atol=0)


def test_progressive_weights_are_losses_of_other_predictions():
    """snr, constant and snr_plus_one times the error of x0 are those of eps, x0 and v; snr_trunc is the larger of the first two."""
    torch.manual_seed(0)
    alpha, sigma = CosineVP().alpha_sigma(torch.rand(5, dtype=torch.float64))
    x0, other, z = torch.randn(3, 5, 1, 3, 3, dtype=torch.float64)
    eps, v = ({x: from_x0(kind, x, z, alpha, sigma) for x in (x0, other)} for kind in ("eps", "v"))
    error = {"snr": per_sample((eps[x0] - eps[other]).square()), "snr_plus_one": per_sample((v[x0] - v[other]).square()), "constant": per_sample((x0 - other).square())}
    error["snr_trunc"] = torch.maximum(error["snr"], error["constant"])
    for kind in WEIGHTS:
        torch.testing.assert_close(denoising_loss(other, x0, progressive_weight(alpha, sigma, kind)), error[kind], rtol=1e-9, atol=0)


def test_unknown_progressive_weight_is_refused():
    """A name that is no weight raises ValueError that repeats it and lists those that are; min-SNR is none of them."""
    with pytest.raises(ValueError, match="'min_snr' is not one of snr_trunc, snr, snr_plus_one, constant"):
        progressive_weight(torch.ones(1), torch.ones(1), "min_snr")


# --- distribution matching -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_dmd_direction_of_a_linear_generator(alpha, sigma):
    """E[alpha (s_fake - s_real) dG] is alpha^2 C_r^-1 (b - m) for b and alpha^2 (C_r^-1 - C_f^-1) A for A."""
    A = torch.tensor([[0.9, -0.3], [0.5, 1.4]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 0.2], dtype=torch.float64, requires_grad=True)
    matching_objective(A, b, alpha, sigma, normalised=False).backward()
    noise = sigma**2 * torch.eye(2, dtype=torch.float64)
    C_r, C_f = alpha**2 * COV + noise, (alpha**2 * A @ A.T + noise).detach()
    torch.testing.assert_close(b.grad, alpha**2 * torch.linalg.solve(C_r, b - MEAN), rtol=0, atol=1e-12)
    torch.testing.assert_close(A.grad, alpha**2 * (C_r.inverse() - C_f.inverse()) @ A, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [1, 2])
def test_dmd_descends_to_the_data(seed):
    """Descent over five levels ends at b = m and A A^T = S, whatever the start, and with the per-sample normaliser on."""
    torch.manual_seed(seed)
    A, b = descend(torch.randn(2, 2, dtype=torch.float64), torch.tensor([2.0, 1.0], dtype=torch.float64),
                   lambda A, b: sum(matching_objective(A, b, *level) for level in LEVELS) / len(LEVELS))
    torch.testing.assert_close(b, MEAN, rtol=0, atol=1e-9)
    torch.testing.assert_close(A @ A.T, COV, rtol=0, atol=1e-9)


def test_dmd_gradient_is_normalised_score_difference():
    """dmd_gradient is (x0_fake - x0_real) / mean|x - x0_real|, and does not change when all three are scaled."""
    torch.manual_seed(0)
    x, real, fake = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    wanted = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(dmd_gradient(x, real, fake), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(dmd_gradient(7 * x, 7 * real, 7 * fake), wanted, rtol=1e-12, atol=0)


def test_dmd_loss_derivative_is_the_gradient():
    """The autograd gradient of dmd_loss(x, g).mean() is g divided by the number of elements."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    x.requires_grad_()
    dmd_loss(x, g).mean().backward()
    torch.testing.assert_close(x.grad, g / g.numel(), rtol=0, atol=1e-17)


def test_dmd_gradient_of_a_sample_ignores_its_neighbours():
    """One sample's gradient is the same alone and beside samples of another scale."""
    torch.manual_seed(0)
    x, real, fake = torch.randn(3, 3, 1, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 100.0, 1e4]).view(-1, 1, 1, 1)
    together = dmd_gradient(x, real, fake)
    for i in range(3):
        assert torch.equal(together[i:i + 1], dmd_gradient(x[i:i + 1], real[i:i + 1], fake[i:i + 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dmd_is_float32_for_half_inputs(dtype):
    """Half-precision inputs give exactly the float32 result of the same numbers, and the loss is float32."""
    torch.manual_seed(0)
    x, real, fake = torch.randn(3, 2, 1, 4, 4).to(dtype)
    g = dmd_gradient(x, real, fake)
    assert g.dtype == torch.float32 and torch.equal(g, dmd_gradient(x.float(), real.float(), fake.float()))
    assert dmd_loss(x, g).dtype == torch.float32


def test_no_gradient_reaches_the_scores():
    """Neither score, nor the normaliser, is part of the loss's graph."""
    torch.manual_seed(0)
    x, real, fake = (torch.randn(2, 1, 4, 4, requires_grad=True) for _ in range(3))
    g = dmd_gradient(x, real, fake)
    dmd_loss(x, g).mean().backward()
    assert not g.requires_grad and real.grad is None and fake.grad is None and x.grad is not None


def test_equal_distributions_give_no_gradient():
    """Where fake and real scores agree every sample's gradient is exactly zero, even where the denoisers change nothing."""
    torch.manual_seed(0)
    x, real = torch.randn(2, 3, 1, 4, 4)
    assert not dmd_gradient(x, real, real.clone()).any()
    assert not dmd_gradient(x, x.clone(), x.clone()).any()


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_generator_moves_towards_the_real_mean(shift):
    """If the fake mean is above the real one, descent lowers the generator's mean, and the other way round."""
    b = (MEAN + shift).requires_grad_()
    matching_objective(square_root(COV), b, *LEVELS[2]).backward()
    assert (b.grad.sign() == math.copysign(1, shift)).all()


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_fake_score_regression_optimum(alpha, sigma):
    """On samples N(b, a^2) the best linear x0 has slope alpha a^2 / (alpha^2 a^2 + sigma^2), and loss a^2 sigma^2 over that."""
    a, b = 0.6, 0.4
    points, weights = gauss_hermite(2)
    x0 = a * points[:, :1] + b
    x_t = alpha * x0 + sigma * points[:, 1:]
    total = alpha**2 * a**2 + sigma**2

    def loss(theta):
        return (weights * denoising_loss(theta[0] * (x_t - alpha * b) + theta[1], x0)).sum()

    theta = torch.zeros(2, dtype=torch.float64)
    slope, curvature = jacobian(loss, theta), hessian(loss, theta)
    best = theta - torch.linalg.solve(curvature, slope)  # the loss is quadratic: one step of Newton's
    torch.testing.assert_close(best, torch.tensor([alpha * a**2 / total, b], dtype=torch.float64), rtol=0, atol=1e-12)
    assert math.isclose(loss(best), a**2 * sigma**2 / total, rel_tol=1e-12)


@pytest.mark.parametrize("angle, flip", [(2.0, 1), (0.7, 1), (0.7, -1)])
def test_regression_fixes_rotation_and_sign(angle, flip):
    """DMD is at rest at every A = S^1/2 Q; pairs y = m + S^1/2 z, alone or beside DMD, pull A from there to S^1/2."""
    Q = torch.tensor([[math.cos(angle), -flip * math.sin(angle)], [math.sin(angle), flip * math.cos(angle)]], dtype=torch.float64)
    root = square_root(COV)
    z, weights = gauss_hermite(2)

    def matching(A, b):
        return matching_objective(A, b, *LEVELS[2])

    def regression(A, b):
        return (weights * regression_loss(z @ A.T + b, z @ root.T + MEAN, "l2")).sum()

    at_rest = [(root @ Q).requires_grad_(), MEAN.clone().requires_grad_()]
    assert max(g.abs().max() for g in torch.autograd.grad(matching(*at_rest), at_rest)) < 1e-12
    for objective in (regression, lambda A, b: regression(A, b) + 0.1 * matching(A, b)):
        A, b = descend(root @ Q, MEAN, objective, steps=500, lr=0.5)
        torch.testing.assert_close(A, root, rtol=0, atol=1e-9)
        torch.testing.assert_close(b, MEAN, rtol=0, atol=1e-9)


# --- adversarial -----------------------------------------------------------------------------------------------------------


def test_best_discriminator_is_the_log_ratio():
    """Of quadratic logits on two Gaussians, log p_real - log p_fake is stationary, and least."""
    m_r, s_r, m_f, s_f = 0.2, 0.7, -0.5, 1.1
    u = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    weights = torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi) * (u[1] - u[0])
    powers = torch.arange(3)

    def loss(c):
        real, fake = ((m + s * u)[:, None] ** powers @ c for m, s in ((m_r, s_r), (m_f, s_f)))
        return (weights * gan_discriminator_loss(real[:, None], fake[:, None])).sum()

    def log_density(m, s):
        return torch.tensor([-0.5 * (m / s) ** 2 - math.log(s), m / s**2, -0.5 / s**2], dtype=torch.float64)

    best = log_density(m_r, s_r) - log_density(m_f, s_f)
    assert jacobian(loss, best).abs().max() < 1e-9
    assert torch.linalg.eigvalsh(hessian(loss, best)).min() > 0


def test_generator_loss_does_not_saturate():
    """Its derivative is -sigmoid(-logit): -1/2 where the discriminator is unsure, and -1 where it is sure of a fake."""
    logits = torch.tensor([-50.0, -2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    gan_generator_loss(logits).sum().backward()
    torch.testing.assert_close(logits.grad, -torch.sigmoid(-logits.detach()), rtol=1e-12, atol=0)
    assert logits.grad[0] == -1 and logits.grad[2] == -0.5


def test_gan_losses_are_per_sample_means():
    """Logits of several positions count with their mean, one value a sample."""
    torch.manual_seed(0)
    real, fake = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(gan_generator_loss(fake), -torch.sigmoid(fake).log().mean((1, 2, 3)), rtol=1e-12, atol=0)
    wanted = -torch.sigmoid(real).log().mean((1, 2, 3)) - torch.sigmoid(-fake).log().mean((1, 2, 3))
    torch.testing.assert_close(gan_discriminator_loss(real, fake), wanted, rtol=1e-12, atol=0)


# --- regression ------------------------------------------------------------------------------------------------------------


def test_regression_closed_forms():
    """A constant difference d over n elements costs d^2 in l2, and sqrt(n d^2 + c^2) - c with c = 0.00054 sqrt(n) in huber."""
    y, n = torch.zeros(3, 2, 4, 4, dtype=torch.float64), 32
    d = torch.tensor([0.0, 1e-4, -0.5], dtype=torch.float64)
    x = y + d.view(-1, 1, 1, 1)
    c = 0.00054 * math.sqrt(n)
    torch.testing.assert_close(regression_loss(x, y, "l2"), d**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(regression_loss(x, y, "huber"), (n * d**2 + c**2).sqrt() - c, rtol=1e-9, atol=0)


def test_regression_takes_a_function():
    """A distance that is a function gets at least float32 images, and gives one value a sample."""
    seen = []

    def distance(a, b):
        seen.extend((a.dtype, b.dtype))
        return (a - b).abs().sum((1, 2, 3), keepdim=True)

    x = torch.ones(2, 1, 3, 3, dtype=torch.bfloat16)
    assert torch.equal(regression_loss(x, -x, distance), torch.tensor([18.0, 18.0]))
    assert seen == [torch.float32, torch.float32]


def test_unknown_distance_is_refused():
    """A name that is no distance raises ValueError that repeats it."""
    with pytest.raises(ValueError, match="l3"):
        regression_loss(torch.zeros(1, 1), torch.zeros(1, 1), "l3")
