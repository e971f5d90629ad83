"""The pure half of the averages: decay rates, widths, and post-hoc weights."""

import numpy as np
import pytest

from trainers.ema import gamma_from_sigma_rel, halflife_beta, posthoc_weights, power_beta, sigma_rel_from_gamma


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.9722), (0.10, 6.93720)])
def test_published_exponents(sigma_rel, gamma):
    """sigma_rel 0.05 and 0.10 are the published gammas."""
    assert abs(gamma_from_sigma_rel(sigma_rel) - gamma) < 1e-4


def test_sigma_rel_and_gamma_are_inverse():
    """gamma -> sigma_rel -> gamma and back, scalars and arrays alike."""
    s = np.linspace(0.01, 0.288, 40)
    np.testing.assert_allclose(sigma_rel_from_gamma(gamma_from_sigma_rel(s)), s, rtol=1e-10)
    g = np.geomspace(0.01, 500, 40)
    np.testing.assert_allclose(gamma_from_sigma_rel(sigma_rel_from_gamma(g)), g, rtol=1e-7)
    assert gamma_from_sigma_rel(0.1) == gamma_from_sigma_rel(np.array([0.1]))[0]


def test_sigma_rel_is_the_width_of_the_profile():
    """sigma_rel is the standard deviation of the density (gamma + 1) t^gamma on [0, 1]."""
    g = 3.3
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert np.isclose(sigma_rel_from_gamma(g), np.sqrt(square - mean**2), rtol=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, [0.1, 0.5]])
def test_width_out_of_range_is_refused(sigma_rel):
    """A width that no power function has raises ValueError."""
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_from_sigma_rel(sigma_rel)


@pytest.mark.parametrize("r", [0.999, 1.0, 1.001])
def test_constant_decay_of_a_geometric_series(r):
    """Past its ramp the half-life profile of r^k is (1 - beta) r (r^k - beta^k) / (r - beta) + beta^k; of a constant, that."""
    batch, halflife, start = 100, 5000, 10_000_000
    beta = 0.5 ** (batch / halflife)
    average = 1.0
    for k in range(1, 301):
        average += (1 - halflife_beta(start + k * batch, batch, halflife)) * (r**k - average)
    assert np.isclose(average, (1 - beta) * r * (r**300 - beta**300) / (r - beta) + beta**300, rtol=1e-11)


def test_halflife_is_one():
    """Over one half-life of images an old weight's share halves, for any batch."""
    for batch in (1, 50, 500):
        steps = range(1_000_000 + batch, 1_005_000 + 1, batch)
        assert np.isclose(np.prod([halflife_beta(images, batch, 5000) for images in steps]), 0.5, rtol=1e-9)


def test_halflife_ramps_with_the_run():
    """Early on the half-life is 9 % of the images seen."""
    assert halflife_beta(1000, 90, 1e6) == 0.5
    assert halflife_beta(2000, 90, 1e6) == 0.5**0.5


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_power_average_of_a_power(k):
    """The power-function average of t^k tends to (gamma + 1) / (gamma + 1 + k) t^k."""
    gamma, batch, values = 6.9372, 32, {}
    average = 123.0
    for step in range(1, 20_001):
        average += (1 - power_beta(step * batch, batch, gamma)) * ((step / 1e4) ** k - average)
        values[step] = average / (step / 1e4) ** k
    limit = (gamma + 1) / (gamma + 1 + k)
    assert abs(values[20_000] - limit) < 3e-4
    assert abs(2 * values[20_000] - values[10_000] - limit) < 1e-7  # what is left falls like 1 / steps


def test_first_step_replaces_the_average():
    """After the first step a power-function average is that step's weights, whatever it was."""
    assert power_beta(64, 64, 6.9372) == 0


# --- post-hoc ------------------------------------------------------------------------------------------------------------


STORED_AT, STORED_WIDTH = np.repeat(np.arange(1, 9) * 1000.0, 2), np.tile([0.05, 0.10], 8)


def test_stored_profile_is_its_own_reconstruction():
    """Asked for what is stored, the weights are one-hot."""
    np.testing.assert_allclose(posthoc_weights(STORED_AT, STORED_WIDTH, STORED_AT, STORED_WIDTH), np.eye(16), atol=1e-7)


def test_posthoc_weights_sum_to_one():
    """Every column of [stored, asked] sums to 1."""
    weights = posthoc_weights(STORED_AT, STORED_WIDTH, [8000, 7000, 4321], [0.075, 0.15, 0.06])
    assert weights.shape == (16, 3)
    np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-12)


@pytest.mark.parametrize("images, width", [(8000, 0.075), (8000, 0.12), (7000, 0.06)])
def test_reconstruction_beats_stored_profiles(images, width):
    """Of a polynomial trajectory, the reconstructed average is 20 times nearer to the direct one than any stored average is."""
    def average(t, sigma_rel):  # of 1 - 2 t + 1.5 t^2 - t^3 in thousands of images, in closed form
        g = gamma_from_sigma_rel(sigma_rel)
        return sum(c * (g + 1) / (g + 1 + k) * (t / 1000) ** k for k, c in enumerate((1, -2, 1.5, -1)))

    stored = np.array([average(t, s) for t, s in zip(STORED_AT, STORED_WIDTH)])
    wanted = average(images, width)
    rebuilt = stored @ posthoc_weights(STORED_AT, STORED_WIDTH, images, width)[:, 0]
    assert abs(rebuilt - wanted) < np.abs(stored - wanted).min() / 20
