"""Metrics against closed forms."""

import pytest
import torch
from torch import nn

from trainers.metrics import class_accuracy, frechet_distance, within_class_std


def samples(n, mean, cov):
    """[n, 1, 2, 2] float64 whose sample mean and covariance are exactly these."""
    z = torch.randn(n, len(mean), dtype=torch.float64)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / (n - 1)), z.T, upper=False)
    return (z.T @ torch.linalg.cholesky(cov).T + mean).view(n, 1, 2, 2)


@pytest.fixture
def gaussians():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    means = torch.randn(2, 4, dtype=torch.float64)
    spectra = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 2.0, 1.0, 9.0]], dtype=torch.float64)
    return means, spectra, [Q @ s.diag() @ Q.T for s in spectra]


def test_frechet_distance_of_commuting_gaussians(gaussians):
    """|m1 - m2|^2 + sum (sqrt l1 - sqrt l2)^2, for sets of different size, and more than one chunk."""
    means, spectra, covs = gaussians
    wanted = (means[0] - means[1]).square().sum() + (spectra[0].sqrt() - spectra[1].sqrt()).square().sum()
    found = frechet_distance(samples(1500, means[0], covs[0]), samples(2300, means[1], covs[1]))
    assert found == pytest.approx(wanted.item(), rel=1e-10)


def test_frechet_distance_of_general_gaussians(gaussians):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), where covariances do not commute; symmetric."""
    means, _, (S1, _) = gaussians
    A = torch.randn(4, 4, dtype=torch.float64)
    S2 = A @ A.T + 0.1 * torch.eye(4)
    values, vectors = torch.linalg.eigh(S1)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S2 @ root).sqrt().sum()
    wanted = (means[0] - means[1]).square().sum() + S1.trace() + S2.trace() - 2 * cross
    a, b = samples(300, means[0], S1), samples(400, means[1], S2)
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(wanted.item(), rel=1e-10)


def test_frechet_distance_to_itself_is_zero():
    """A set is at distance 0 from itself, also where pixels are constant and the covariance is singular."""
    images = torch.randn(200, 1, 2, 2)
    images[:, :, 0] = 0.25
    assert abs(frechet_distance(images, images)) < 1e-6


def test_frechet_distance_reads_the_features_that_it_is_given():
    """With a feature network, only what it sees counts."""
    class LeftColumn(nn.Module):
        num_features = 2

        def forward(self, images):
            return images[:, 0, :, 0]

    torch.manual_seed(0)
    a = torch.randn(100, 1, 2, 2, dtype=torch.float64)
    b = a.clone()
    b[..., 1] += 5
    assert abs(frechet_distance(a, b, LeftColumn())) < 1e-6
    b[..., 0] += 3
    assert frechet_distance(a, b, LeftColumn()) == pytest.approx(18, rel=1e-6)


def test_within_class_std_ignores_the_distance_of_classes():
    """Classes far apart, with spreads 1 and 3 of their own, have 2 together."""
    spread = torch.tensor([-1.0, 0.0, 1.0]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    images = torch.cat([100 + spread, -100 + 3 * spread])
    assert within_class_std(images, torch.tensor([0, 0, 0, 7, 7, 7])) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("wrong", [0, 10, 40])
def test_class_accuracy_counts_wrong_classes(wrong):
    """Of 40 separable samples, the share whose asked-for class the judge finds."""
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    images = nn.functional.one_hot(labels, 4).float().view(-1, 1, 2, 2) + 0.05 * torch.randn(40, 1, 2, 2)
    asked = labels.clone()
    asked[:wrong] = (asked[:wrong] + 1) % 4
    assert class_accuracy(images, asked, images, labels) == pytest.approx(1 - wrong / 40)


def test_frechet_distance_of_images_averaged_down():
    """At a lower resolution it is the distance of block means: blind to detail, and the same for what has the same means."""
    torch.manual_seed(0)
    coarse = torch.randn(2, 200, 1, 4, 4, dtype=torch.float64)
    a, b = (c.repeat_interleave(2, 2).repeat_interleave(2, 3) for c in coarse)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(4, 4)
    assert frechet_distance(a + checks, b, resolution=4) == pytest.approx(frechet_distance(coarse[0], coarse[1]), rel=1e-9)
    assert frechet_distance(a + checks, b) > frechet_distance(a, b) + 60
