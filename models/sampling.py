"""Samplers. Latents are unit Gaussian [B, C, H, W]; nothing here draws a random number that was not handed in.

A "denoiser" is any callable (x_t, t, cond) -> x0 with a `.schedule`. Samplers keep the latents' dtype, at least float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from models.conditioning import class_labels, concatenate, unconditional
from models.denoiser import at_least_float32
from models.noise import Noise
from models.schedules import EDM, expand

LATENT_CHANNELS = 4  # what has so many, or more, is no image, and has no bounds
DRAW_STREAM = 1_000_000  # of random numbers, which training never touches


class Guided:
    """Guidance: x0 = weak + w (strong - weak), so w = 1 is none. w: a number, or [B].

    strong is the denoiser under its condition. weak is the same network under `uncond`, in one batched pass (classifier-free
    guidance; Ho & Salimans 2021), or another network, `guide`, under the same condition: a smaller and less trained one
    (autoguidance; Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself"), or an unconditional one.
    """

    def __init__(self, denoiser: Callable, guidance: float | Tensor, uncond: dict | None = None, guide: Callable | None = None):
        self.denoiser, self.guidance, self.uncond, self.guide, self.schedule = denoiser, guidance, uncond, guide, denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict | None) -> Tensor:
        t = t.expand(x_t.shape[0])
        if self.guide is not None:
            weak, strong = self.guide(x_t, t, cond), self.denoiser(x_t, t, cond)
        else:
            both = concatenate(unconditional(cond, self.uncond), cond)
            weak, strong = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        w = expand(self.guidance, x_t) if torch.is_tensor(self.guidance) else self.guidance
        return weak + w * (strong - weak)


class GuidedByCondition:
    """Guidance whose strength is in cond["guidance"] [B], for a denoiser that does not take it."""

    def __init__(self, denoiser: Callable):
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        plain = {key: value for key, value in cond.items() if key != "guidance"}
        return Guided(self.denoiser, cond["guidance"])(x_t, t, plain)


def guided(denoiser: Callable, guidance: float = 1.0, uncond: dict | None = None, guide: Callable | None = None) -> Callable:
    return denoiser if guidance == 1.0 else Guided(denoiser, guidance, uncond, guide)


@torch.no_grad()
def ddim(denoiser, latents: Tensor, steps: int, cond: dict | None = None, guidance: float = 1.0, uncond: dict | None = None,
         guide: Callable | None = None, times: Sequence[float] | None = None) -> Tensor:
    """Deterministic DDIM (Song et al. 2021): the Euler method of any (alpha, sigma).

    times: steps + 1 of them, from noise down to 0, by default the schedule's own grid. A student distilled on other times keeps them
    in its description.
    """
    denoise, schedule = guided(denoiser, guidance, uncond, guide), denoiser.schedule
    latents = at_least_float32(latents)
    times = (schedule.grid(steps) if times is None else torch.tensor(times, dtype=torch.float64)).to(latents)
    if len(times) != steps + 1:
        raise ValueError(f"{steps} steps want {steps + 1} times, and {len(times)} are given")
    x = latents * schedule.noise_scale(times[0])
    for t, s in zip(times[:-1], times[1:]):
        x = ddim_step(schedule, x, denoise(x, t.expand(len(x)), cond), t, s)
    return x


def ddim_step(schedule, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From time t down to s along the straight line through x0: x_s = alpha_s x0 + (sigma_s / sigma_t)(x_t - alpha_t x0). t, s: [B] or 0-d."""
    alpha_t, sigma_t, alpha_s, sigma_s = (expand(c, x_t) for time in (t, s) for c in schedule.alpha_sigma(time))
    return alpha_s * x0 + (sigma_s / sigma_t) * (x_t - alpha_t * x0)


@torch.no_grad()
def heun(denoiser, latents: Tensor, steps: int, cond: dict | None = None, guidance: float = 1.0, uncond: dict | None = None,
         sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, guide: Callable | None = None) -> Tensor:
    """Heun's second-order method without churn (Karras et al. 2022, algorithm 1): 2 * steps - 1 network calls.

    For denoisers on the EDM schedule. The last step, to sigma = 0, is Euler's.
    """
    if not isinstance(denoiser.schedule, EDM):
        raise ValueError(f"heun samples denoisers on the EDM schedule, not {type(denoiser.schedule).__name__}: use ddim")
    denoise, latents = guided(denoiser, guidance, uncond, guide), at_least_float32(latents)
    times = EDM(sigma_min, sigma_max, rho).grid(steps).to(latents)
    x = latents * times[0]
    for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
        d = (x - denoise(x, t.expand(len(x)), cond)) / t
        x_next = x + (s - t) * d
        if i < steps - 1:
            d_next = (x_next - denoise(x_next, s.expand(len(x)), cond)) / s
            x_next = x + (s - t) * (d + d_next) / 2
        x = x_next
    return x


def few_step(generator, latents: Tensor, timesteps: Sequence[float], cond: dict | None = None,
             generator_noise: torch.Generator | Sequence[Tensor] | None = None) -> Tensor:
    """A distilled generator: denoise at timesteps[0] from pure noise, then noise anew and denoise at each later one.

    timesteps: the student's own, from noise to data; one of them makes a one-step generator. generator_noise: for 2 steps or
    more, the fresh noise, as a torch.Generator or as one unit Gaussian tensor a later step. Gradient flows through all calls:
    wrap it in no_grad to draw images.
    """
    if len(timesteps) > 1 and generator_noise is None:
        raise ValueError(f"{len(timesteps)} steps need fresh noise for all but the first: give generator_noise")
    schedule, latents = generator.schedule, at_least_float32(latents)
    for i, step in enumerate(timesteps):
        t = latents.new_full((len(latents),), float(step))
        if i == 0:
            x = latents * schedule.noise_scale(float(step)).to(latents)
        else:
            drawn = isinstance(generator_noise, torch.Generator)
            eps = torch.randn(x.shape, generator=generator_noise, device=x.device, dtype=x.dtype) if drawn else generator_noise[i - 1]
            x = schedule.add_noise(x, eps, t)
        x = generator(x, t, cond)
    return x


def sample(denoiser, sampler: dict, latents: list[Tensor], cond: dict | None = None, **guidance) -> Tensor:
    """Images by a model's own sampler, as its config.json states it: {"type": "heun" | "ddim" | "few_step", **settings}.

    latents: one tensor for each draw of noise that the sampler makes (`noise_draws`). guidance: `guidance`, `uncond` and `guide`
    of the many-step samplers.
    """
    settings = {key: value for key, value in sampler.items() if key != "type"}
    if sampler["type"] == "few_step":
        with torch.no_grad():
            return few_step(denoiser, latents[0], settings["timesteps"], cond, latents[1:])
    return {"heun": heun, "ddim": ddim}[sampler["type"]](denoiser, latents[0], cond=cond, **settings, **guidance)


def noise_draws(sampler: dict) -> int:
    """How many Gaussian tensors a sampler needs."""
    return len(sampler["timesteps"]) if sampler["type"] == "few_step" else 1


def network_calls(sampler: dict) -> int:
    """Passes of the network for one image, guidance aside."""
    return {"heun": lambda s: 2 * s["steps"] - 1, "ddim": lambda s: s["steps"], "few_step": lambda s: len(s["timesteps"])}[sampler["type"]](sampler)


def draw(denoiser, description: dict, numbers: range, batch: int, seed: int = 0, labels: Tensor | None = None,
         progress: str | None = None, **guidance) -> tuple[Tensor, Tensor | None]:
    """Images in [-1, 1], or latents, by a model's own sampler, on the host, with their labels.

    Image number i is the same for a seed, whatever is drawn with it. labels [len(numbers)]: None takes all classes in turn.
    description: a model's config.json. progress: what a progress bar should say. guidance: as in `sample`; to a student that takes the
    strength as an input, by default the lowest that it knows.
    """
    device = next(denoiser.parameters()).device
    shape = (description["channels"], description["resolution"], description["resolution"])
    if labels is None and description["classes"]:
        labels = torch.tensor(numbers) % description["classes"]
    bar = tqdm(total=len(numbers), desc=progress, unit="img", disable=None if progress else True)
    parts, strength = [], guidance.pop("guidance", description["guidance"][0]) if "guidance" in description else None
    for i in range(0, len(numbers), batch):
        noise = Noise(seed, DRAW_STREAM, numbers[i:i + batch], device)
        latents = [noise.normal(*shape) for _ in range(noise_draws(description["sampler"]))]
        cond = class_labels(None if labels is None else labels[i:i + batch].to(device))
        if strength is not None:
            cond["guidance"] = torch.full((len(latents[0]),), float(strength), device=device)
        drawn = sample(denoiser, description["sampler"], latents, cond, **guidance).cpu()
        parts.append(drawn if shape[0] >= LATENT_CHANNELS else drawn.clamp(-1, 1))
        bar.update(len(parts[-1]))
    bar.close()
    return torch.cat(parts), labels
