"""What a DMD cycle costs beside its bare network passes: python benchmarks/dmd_cycle.py

A cycle is one update of the generator and `fake_updates` of the fake score. The passes that it makes are counted with hooks, and
each kind is timed alone, bare: no optimizer, no noise, no average. The ratio of the two times is what the trainer adds. Both are
taken in one run, in turn, as the machine's speed drifts.

Measured (two-core CPU, one thread, float32, batch 16, 32x32x3, 7M parameters a network): see docs/results.md.
"""

import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from models import hub
from models.denoiser import Denoiser
from models.edm2_unet import EDM2UNet, LogVar
from models.noise import Noise
from models.schedules import EDM
from trainers.config import DataConfig
from trainers.data import Batch
from trainers.dmd import DMD, DmdConfig
from trainers.engine import Cluster
from trainers.launch import Plan
from trainers.optim import OptimConfig

BATCH, FAKE_UPDATES = 16, 2
NETWORK = dict(model_channels=64, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16, 8))


def build(folder: Path) -> DMD:
    denoiser = Denoiser(EDM2UNet(32, 3, 10, **NETWORK), EDM(), "edm", LogVar())
    hub.save(folder / "teacher", {**hub.describe(denoiser), "sampler": {"type": "heun", "steps": 18}}, denoiser.state_dict())
    config = DmdConfig(teacher=str(folder / "teacher"), out=str(folder / "run"), data=DataConfig(resolution=32, channels=3), fake_updates=FAKE_UPDATES,
                       gan_weight=1e-3, generator=OptimConfig(clip=10.0), fake_score=OptimConfig(clip=10.0))
    config = replace(config, loop=replace(config.loop, batch=BATCH))
    made = DMD(DMD.prepare(config), Cluster(DMD.networks, Plan.read(None)), None)
    made.build()
    return made


def cycle(made: DMD, images: torch.Tensor, labels: torch.Tensor) -> None:
    for _ in range(FAKE_UPDATES):
        first = made.images_seen
        made.step(Batch(images, {"labels": labels}, Noise(0, 0, range(first, first + BATCH), made.cluster.device)))
        made.images_seen += BATCH
    _synchronize()


def bare(made: DMD, images: torch.Tensor, labels: torch.Tensor) -> None:
    """The same passes, on fixed inputs."""
    generator, fake, teacher = made.generator.module, made.fake_score.module, made.teacher
    cond, t = {"labels": labels}, torch.ones(BATCH, device=images.device)
    both, t2 = {"labels": torch.cat([labels, labels])}, torch.cat([t, t])
    x_gen = generator(images, t, cond)
    with torch.no_grad():
        teacher(images, t, cond), fake(images, t, cond)
    fake.requires_grad_(False)
    loss = x_gen.square().mean() + fake(x_gen, t, cond, denoise=False, logits=True).logits.mean()
    loss.backward()
    fake.requires_grad_(True)
    for k in range(FAKE_UPDATES):
        if k:
            with torch.no_grad():
                generator(images, t, cond)
        score = fake(images, t, cond)
        logits = fake(torch.cat([images, images]), t2, both, denoise=False, logits=True).logits
        (score.x0.square().mean() + score.logvar.mean() + logits.mean()).backward()
    generator.zero_grad()
    fake.zero_grad()
    _synchronize()


def passes(made: DMD, images, labels) -> Counter:
    """Calls of each network in a cycle, by batch size."""
    counted, hooks = Counter(), []
    for name, module in (("generator", made.generator.module), ("fake score", made.fake_score.module), ("teacher", made.teacher)):
        hooks.append(module.register_forward_pre_hook(lambda m, args, n=name: counted.update([f"{n} on {len(args[0])}"])))
    cycle(made, images, labels)
    for hook in hooks:
        hook.remove()
    return counted


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(function, *arguments) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder))
        images, labels = torch.randn(BATCH, 3, 32, 32, device=made.cluster.device), torch.arange(BATCH, device=made.cluster.device) % 10
        print("passes in a cycle:", ", ".join(f"{count} x {what}" for what, count in passes(made, images, labels).items()))
        bare(made, images, labels)
        pairs = [(_seconds(cycle, made, images, labels), _seconds(bare, made, images, labels)) for _ in range(7)]
        print(f"cycle {median(c for c, _ in pairs):.3f} s, bare passes {median(b for _, b in pairs):.3f} s, ratio {median(c / b for c, b in pairs):.3f}")


if __name__ == "__main__":
    main()
