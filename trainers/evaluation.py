"""Looking at a run while it trains: its average's samples at fixed noise, as a picture and as a distance to real images.

OUT/samples/IMAGES.png    the first samples, always of the same noise and classes
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from models.autoencoder import Autoencoder
from models.denoiser import Denoiser
from models.edm2_unet import fold_weights
from models.sampling import LATENT_CHANNELS, draw
from trainers import pictures
from trainers.config import RunConfig
from trainers.data import ImageSet, StreamedSet, load_images
from trainers.metrics import frechet_distance

REAL = 50_000  # real images that samples are compared with, at most
SHOWN = 64  # samples in a picture


class Evaluation:
    """What a run's samples are compared with, and how. Made before training, so that what is wrong with it is said then.

    Raises ConfigError for a split that cannot be read, and ModelError for an autoencoder that cannot. Every rank makes one, and calls it;
    the main process alone holds the real images.
    """

    def __init__(self, config: RunConfig, cluster, images: ImageSet | StreamedSet):
        self.config, self.cluster, self.autoencoder = config, cluster, None
        if cluster.is_main:
            same = config.eval.split == config.data.split
            images = images if same else load_images(replace(config.data, split=config.eval.split))
            self.real = images.first(REAL)[0]
            if config.data.channels >= LATENT_CHANNELS and config.eval.autoencoder is not None:
                self.autoencoder = Autoencoder(config.eval.autoencoder, cluster.device)

    def __call__(self, denoiser: Denoiser, description: dict, images_seen: int) -> float | None:
        """The Fréchet distance of samples to real images, on pixels; None on all ranks but the main one.

        The denoiser is spent: its weights are folded. Training is left as it was.
        """
        config, world = self.config.eval, self.cluster.world
        each = -(-config.samples // world)
        numbers = range(self.cluster.rank * each, (self.cluster.rank + 1) * each)
        samples, _ = draw(fold_weights(denoiser), description, numbers, config.batch, self.config.seed)
        samples = self.cluster.gather(samples.to(self.cluster.device))[:config.samples].cpu()
        if not self.cluster.is_main:
            return None
        self._show(samples[:SHOWN], images_seen)
        return frechet_distance(samples, self.real, resolution=config.fd_resolution)

    def _show(self, samples: Tensor, images_seen: int) -> None:
        if samples.shape[1] >= LATENT_CHANNELS:
            if self.autoencoder is None:
                return  # latents are no picture
            samples = self.autoencoder.decode(samples)
        folder = Path(self.config.out) / "samples"
        folder.mkdir(exist_ok=True)
        pictures.grid(folder / f"{images_seen:012d}.png", samples)
