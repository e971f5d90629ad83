"""How good samples are. Float64 statistics, by torchmetrics."""

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class Pixels(nn.Module):
    """The images themselves as features, averaged down to `resolution`: no weights to fetch.

    A distance to be trusted where there are several times as many images as features; the smaller, the blinder to detail.
    """

    def __init__(self, channels: int, resolution: int):
        super().__init__()
        self.num_features, self.resolution = channels * resolution**2, resolution

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, self.resolution).flatten(1)


def frechet_distance(images: Tensor, reference: Tensor, features: nn.Module | None = None, resolution: int = 0) -> float:
    """Fréchet distance between Gaussians fitted to the features of two sets of images [n, C, R, R].

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), in float64. features: by default pixels, of images averaged down to `resolution` (0: as they are).
    """
    features = features or Pixels(images.shape[1], resolution or images.shape[2])
    metric = FrechetInceptionDistance(feature=features, sync_on_compute=False).set_dtype(torch.float64)  # of what this process has
    for part, real in ((reference, True), (images, False)):
        for chunk in part.double().split(1000):
            metric.update(chunk, real=real)
    return float(metric.compute())


def within_class_std(images: Tensor, labels: Tensor) -> float:
    """Diversity: the standard deviation of a pixel among samples of one class, averaged over pixels and classes."""
    return float(torch.stack([images[labels == c].std(0).mean() for c in labels.unique()]).mean())


def class_accuracy(images: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> float:
    """Share of samples that a support-vector machine, fitted to the reference images, takes for the class that was asked for."""
    from sklearn.svm import SVC

    judge = SVC(gamma="scale", C=10).fit(reference.flatten(1).numpy(), reference_labels.numpy())
    return float(np.mean(judge.predict(images.flatten(1).numpy()) == labels.numpy()))
