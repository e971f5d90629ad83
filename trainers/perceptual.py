"""LPIPS, with weights that come from a file or the hub (package `lpips`; Zhang et al. 2018)."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.config import ConfigError

BACKBONES = {"vgg": ("vgg16-397923af.pth", "vgg16"), "alex": ("alexnet-owt-7be5be79.pth", "alexnet")}


class Lpips(nn.Module):
    """Distance [B] of images in [-1, 1], brought to three channels and 224x224, as DMD's regression uses it.

    weights: the backbone's file, as torchvision publishes it; None: torch's hub cache, or the hub. Raises ConfigError that names
    the file to bring where it cannot be had.
    """

    def __init__(self, backbone: str = "vgg", weights: str | None = None):
        super().__init__()
        import lpips

        path = _backbone_file(backbone, weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's deprecated arguments, in the package
            self.net = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
        self._fill(path, BACKBONES[backbone][0])
        self.eval().requires_grad_(False)

    def _fill(self, path: Path, file: str) -> None:
        """torchvision numbers the layers of `features`; the package keeps those numbers inside its slices."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            own = {name: state["features." + ".".join(name.split(".")[-2:])] for name in self.net.net.state_dict()}
            self.net.net.load_state_dict(own)
        except Exception as error:  # unpickling raises many kinds for a file of another sort
            raise ConfigError(f"{path} is not torchvision's {file} ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(*(self._prepared(image) for image in (x, y))).flatten()

    @staticmethod
    def _prepared(image: Tensor) -> Tensor:
        image = image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image
        return F.interpolate(image, size=(224, 224), mode="bilinear", align_corners=False)


def _backbone_file(backbone: str, weights: str | None) -> Path:
    if backbone not in BACKBONES:
        raise ConfigError(f"regression.backbone is {backbone}, and must be one of {', '.join(BACKBONES)}")
    file, _ = BACKBONES[backbone]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    path = Path(weights) if weights else cached
    if not path.is_file() and not weights:
        _download(backbone, cached)
    if not path.is_file():
        raise ConfigError(f"LPIPS needs the weights of its backbone, which are not at {path}: bring torchvision's {file} and name it with "
                          f"--regression.weights, or put it at {cached}")
    return path


def _download(backbone: str, path: Path) -> None:
    """Ask torchvision for the weights; leaves nothing behind where there is no network."""
    import torchvision

    try:
        torchvision.models.get_model(BACKBONES[backbone][1], weights="DEFAULT")
    except OSError:
        path.unlink(missing_ok=True)
