"""Images to latents and back, round a diffusers AutoencoderKL.

The house's images lie in [-1, 1], the network's in [0, 1]: EDM2's latents were encoded from x / 255 (reference: NVlabs' StabilityVAEEncoder),
though the autoencoder was trained on [-1, 1], and its published means and deviations hold for that range alone.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.hub import ModelError


@dataclass(frozen=True)
class Normalisation:
    """Raw latents <-> those that networks are trained on. Defaults: EDM2's for sd-vae-ft-mse (Karras et al. 2024), per channel."""

    raw_mean: tuple[float, ...] = (5.81, 3.25, 0.12, -2.15)
    raw_std: tuple[float, ...] = (4.17, 4.62, 3.71, 3.28)
    final_mean: float = 0.0
    final_std: float = 0.5

    def normalize(self, raw: Tensor) -> Tensor:
        """[B, C, h, w] -> float32 with mean final_mean and standard deviation final_std, over a large set of images."""
        mean, std = self._statistics(raw)
        return (raw.float() - mean) * (self.final_std / std) + self.final_mean

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self._statistics(latents)
        return (latents.float() - self.final_mean) * (std / self.final_std) + mean

    def _statistics(self, like: Tensor) -> list[Tensor]:
        return [torch.tensor(values, device=like.device).view(-1, 1, 1) for values in (self.raw_mean, self.raw_std)]


class Autoencoder:
    """A frozen AutoencoderKL, from a folder that save_pretrained wrote or from a hub id. It computes in float32, without gradient.

    batch: images that pass through the network at a time. Tensors come back on the device on which they were given.
    Raises ModelError where there is no such model, or where it does not fit `normalisation`.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", normalisation: Normalisation = Normalisation(), batch: int = 8):
        self.network = _load(path).to(device).eval().requires_grad_(False)
        self.device, self.normalisation, self.batch = torch.device(device), normalisation, batch
        self.channels, self.factor = self.network.config.latent_channels, 2 ** (len(self.network.config.block_out_channels) - 1)
        if self.channels != len(normalisation.raw_mean):
            raise ModelError(f"{path}: its latents have {self.channels} channels, and the normalisation is for {len(normalisation.raw_mean)}")
        if self.network.config.in_channels != 3:
            raise ModelError(f"{path}: it is for images of {self.network.config.in_channels} channels, not of 3")

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, R, R] in [-1, 1] -> the posterior's (mean, std), raw latents [B, C, R / 8, R / 8] in float32."""
        posteriors = [self.network.encode(part.to(self.device).float() / 2 + 0.5).latent_dist for part in images.split(self.batch)]
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]).to(images.device) for name in ("mean", "std"))
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, r, r] -> images [B, 3, 8 r, 8 r] in [-1, 1], clamped."""
        parts = [self.network.decode(self.denormalize(part.to(self.device))).sample for part in latents.split(self.batch)]
        return (torch.cat(parts) * 2 - 1).clamp(-1, 1).to(latents.device)

    def normalize(self, raw: Tensor) -> Tensor:
        return self.normalisation.normalize(raw)

    def denormalize(self, latents: Tensor) -> Tensor:
        return self.normalisation.denormalize(latents)

    def weights_hash(self) -> str:
        """Of names, shapes and values of all weights: the same for a folder and for the hub's copy of it."""
        found = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.network.state_dict().items()):
            found.update(f"{name}{tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().numpy())
        return found.hexdigest()


def _load(path: str):
    """diffusers' AutoencoderKL with all of its weights, read from safetensors alone."""
    from diffusers import AutoencoderKL

    local = Path(path).expanduser().is_dir()
    if not local and path.startswith((".", "/", "~")):
        raise ModelError(f"{path}: there is no such folder")
    where = {"pretrained_model_name_or_path": str(Path(path).expanduser()) if local else path, "local_files_only": local}
    try:
        kind = AutoencoderKL.load_config(**where).get("_class_name")
        if kind != "AutoencoderKL":
            raise ModelError(f"{path}: it is a {kind}, not an AutoencoderKL")
        network, found = AutoencoderKL.from_pretrained(**where, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True)
    except ModelError:
        raise
    except Exception as error:  # diffusers and huggingface_hub raise a dozen kinds for what is missing, damaged or out of reach
        raise ModelError(f"{path}: no AutoencoderKL can be read there ({' '.join(str(error).split())[:300]})") from None
    if any(found.values()):
        kind, names = next((kind, names) for kind, names in found.items() if names)
        raise ModelError(f"{path}: its weights do not fit its config.json ({kind.replace('_', ' ')}: {', '.join(map(str, names))[:200]})")
    return network
