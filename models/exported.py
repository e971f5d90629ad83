"""What an exported folder runs. `models/export.py` bundles these two classes, with all that they use, into the folder's pipeline.py."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from models.conditioning import class_labels
from models.hub import build
from models.sampling import LATENT_CHANNELS, noise_draws, sample


class FewstepDenoiser(ModelMixin, ConfigMixin):
    """denoiser(x_t, t, cond) -> x0 as a component of a diffusers pipeline. description: what it is built of and how it is sampled."""

    @register_to_config
    def __init__(self, description: dict):
        super().__init__()
        self.denoiser = build(description)


class FewstepPipeline(DiffusionPipeline):
    """Images by the model's own sampler: its network, schedule, times and number of steps, as it was distilled."""

    def __init__(self, denoiser: FewstepDenoiser):
        super().__init__()
        self.register_modules(denoiser=denoiser)

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, labels: list[int] | Tensor | None = None, generator: torch.Generator | list | None = None,
                 latents: Tensor | list[Tensor] | None = None, guidance: float | None = None, output_type: str = "pil", return_dict: bool = True):
        """labels: a class for each image, by default all in turn; batch_size counts where they are not given. latents: unit Gaussian
        [B, C, H, W], or a list of one for each draw of noise that the sampler makes; those that are not given are drawn. guidance: w of
        uncond + w (cond - uncond), for a model that has an unconditional form or takes w as an input; by default none, or as little as the
        model takes. output_type: "pil", "np" or "pt", in [0, 1], or "latent": what the sampler returns, untouched."""
        about = self.denoiser.config["description"]
        if about["channels"] >= LATENT_CHANNELS and output_type != "latent":
            raise ValueError('this model makes latents: ask for output_type="latent", and decode them with the autoencoder that it was trained on')
        labels = self.labels(about["classes"], batch_size, labels)
        shape = (batch_size if labels is None else len(labels), about["channels"], about["resolution"], about["resolution"])
        noise = [] if latents is None else [latents] if torch.is_tensor(latents) else list(latents)
        noise = [given.to(self._execution_device) for given in noise]
        while len(noise) < noise_draws(about["sampler"]):
            noise.append(randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32))
        cond, settings = self.guidance(about, guidance, class_labels(labels), noise[0])
        images = sample(self.denoiser.denoiser, about["sampler"], noise, cond, **settings)
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def labels(self, classes: int, batch_size: int, labels: list[int] | Tensor | None) -> Tensor | None:
        if not classes:
            if labels is not None:
                raise ValueError("labels are given, and this model has no classes")
            return None
        labels = torch.arange(batch_size) % classes if labels is None else torch.as_tensor(labels)
        if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels is {labels.tolist()}, and must be a list of classes from 0 to {classes - 1}")
        return labels.to(self._execution_device)

    def guidance(self, about: dict, guidance: float | None, cond: dict | None, like: Tensor) -> tuple[dict | None, dict]:
        """The condition and the sampler's settings that guide so strongly."""
        if about["backbone"].get("guided"):
            low, high = about["guidance"]
            guidance = min(max(1.0, low), high) if guidance is None else guidance
            if not low <= guidance <= high:
                raise ValueError(f"guidance is {guidance}, and this model takes {low} to {high}")
            return {**(cond or {}), "guidance": like.new_full((len(like),), guidance)}, {}
        guidance = 1.0 if guidance is None else guidance
        if guidance != 1 and (not about.get("unconditional") or about["sampler"]["type"] == "few_step"):
            raise ValueError(f"guidance is {guidance}, and this model has no guidance that could be set")
        return cond, {} if guidance == 1 else {"guidance": guidance}
