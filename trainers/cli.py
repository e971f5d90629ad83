"""The command `fewstep`: what is not training."""

import json
import os
import re
import sys
import time
from pathlib import Path

import torch
import yaml
from jsonargparse import auto_cli

from models import hub
from models.autoencoder import Autoencoder
from models.edm2_unet import fold_weights
from models.export import export as export_model
from models.sampling import LATENT_CHANNELS, draw, network_calls
from trainers import pictures, posthoc
from trainers.compare import ladder_table, students
from trainers.config import ConfigError, DataConfig, require, writable
from trainers.data import ImageSet, StreamedSet, load_images
from trainers.demo import demo
from trainers.evaluation import REAL
from trainers.latents import make_cache
from trainers.metrics import class_accuracy, frechet_distance, within_class_std
from trainers.pairs import make_pairs


def sample(model: str, out: str = "samples.png", seeds: str = "0-63", labels: list[int] | None = None, batch: int = 64,
           guidance: float | None = None, guide: str | None = None, autoencoder: str | None = None) -> None:
    """Draw images from a run or a model's folder, and write them as a grid.

    Args:
        model: A run's folder, or a model's.
        out: The picture to write.
        seeds: "0-63" or "3,7,9". A seed makes the same image whatever is drawn with it.
        labels: Classes, repeated over the seeds; by default all in turn.
        batch: Images drawn at a time.
        guidance: Strength w of uncond + w (cond - uncond); 1 is none, and the default where the model can do without.
        guide: A weaker model to guide away from (autoguidance); by default the model itself without labels.
        autoencoder: What decodes the latents of a latent model: a folder or hub id of an AutoencoderKL.
    """
    numbers = _numbers(seeds)
    writable(str(Path(out).parent))
    about = hub.description(model)
    device = _device()
    require("conditions" not in about, f"{model} is told a prompt, and this command has none to give: encode prompts and sample in Python, as the README shows")
    if labels:
        require(about["classes"] > 0, f"labels is {labels}, and {model} has no classes")
        require(0 <= min(labels) and max(labels) < about["classes"], f"labels is {labels}, and {model} has classes 0 to {about['classes'] - 1}")
    chosen = torch.tensor([labels[i % len(labels)] for i in range(len(numbers))]) if labels else None
    require(autoencoder is not None or about["channels"] < LATENT_CHANNELS, f"{model} makes latents: name what decodes them with --autoencoder")
    guiding = _guiding(model, about, guidance, guide, device)
    began = time.time()
    images, _ = draw(fold_weights(hub.load_denoiser(model, device)), about, numbers, batch, labels=chosen, progress="sampling", **guiding)
    print(f"{len(images)} images, {len(images) / (time.time() - began):.1f} images/s, {network_calls(about['sampler'])} network calls each: {out}")
    pictures.grid(Path(out), images if autoencoder is None else Autoencoder(autoencoder, device).decode(images))


def _guiding(model: str, about: dict, guidance: float | None, guide: str | None, device: str) -> dict:
    """The sampler's guidance settings. Raises ConfigError where there is nothing to guide with."""
    if guidance is None or guidance == 1.0 and "guidance" not in about:
        return {}
    if "guidance" in about:
        low, high = about["guidance"]
        require(low <= guidance <= high and guide is None, f"guidance is {guidance}, and {model} was distilled for {low} to {high}, without a guide")
        return {"guidance": guidance}
    distilled = about["sampler"]["type"] == "few_step" or "times" in about["sampler"]
    require(not distilled, f"guidance is {guidance}, and {model} is a few-step student: its teacher was guided, it is not")
    require(guide is not None or about.get("unconditional", False),
            f"guidance is {guidance}, and {model} was never trained without labels: name a weaker model with --guide")
    if guide is None:
        return {"guidance": guidance}
    weaker = hub.description(guide)
    for name in ("resolution", "channels"):
        require(weaker[name] == about[name], f"guide {guide} has {name} {weaker[name]}, and {model} has {about[name]}: they must agree")
    return {"guidance": guidance, "guide": fold_weights(hub.load_denoiser(guide, device))}


def _numbers(seeds: str) -> list[int]:
    try:
        parts = [part.split("-") for part in seeds.split(",")]
        return [i for part in parts for i in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        raise ConfigError(f"seeds is {seeds!r}, and must look like 0-63 or 3,7,9") from None


def score(run: str, split: str = "all", samples: int = 2000, batch: int = 500) -> None:
    """Measure a run's samples against the data that it was trained on.

    Args:
        run: A run's folder.
        split: Which part of the data.
        samples: How many to draw, all classes in turn.
        batch: Images drawn at a time.
    """
    images, resolution = _data_of(run, split)
    real, real_labels = images.first(REAL)
    drawn, labels = draw(fold_weights(hub.load_denoiser(run, _device())), hub.description(run), range(samples), batch, progress="sampling")
    print(f"Fréchet distance on pixels {frechet_distance(drawn, real, resolution=resolution):.4f} ({samples} samples against {len(real)} images "
          f"of split {split}, at {resolution}x{resolution})")
    if labels is not None:
        print(f"class accuracy {class_accuracy(drawn, labels, real, real_labels):.4f}, within-class std {within_class_std(drawn, labels):.4f} "
              f"(real {within_class_std(real, real_labels):.4f})")


def _data_of(run: str, split: str) -> tuple[ImageSet | StreamedSet, int]:
    """The data that a run was trained on, and the resolution at which its samples are compared with it."""
    file = Path(run) / "config.yaml"
    require(file.is_file(), f"{run} is not a run's folder: it has no config.yaml")
    config = yaml.safe_load(file.read_text())["config"]
    return load_images(DataConfig(**{**config["data"], "split": split})), config["eval"].get("fd_resolution") or config["data"]["resolution"]


def ema(run: str, sigma_rel: float = 0.1, at: int | None = None, out: str | None = None) -> None:
    """Make an average of another length than those that a run kept, from the ones that it stored (--loop.snapshot_every).

    Args:
        run: A run's folder.
        sigma_rel: The average's width, relative to the run's length.
        at: Where it ends, in images seen; by default at the last stored average.
        out: The model's folder to write; by default one in the run's.
    """
    out = out or f"{run}/model-{sigma_rel:.3f}"
    tensors = posthoc.reconstruct(run, sigma_rel, at)
    writable(out)
    hub.save(out, {**posthoc.description(run), "trained": {"run": run, "sigma_rel": sigma_rel, "at": at}}, tensors)
    print(f"{out}: the average of sigma_rel {sigma_rel} of {run}")


def sweep(run: str, sigma_rel: list[float] = [0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25], at: int | None = None,  # noqa: B006
          split: str = "train", samples: int = 2000, batch: int = 500) -> None:
    """Measure averages of many lengths of a run: RUN/sweep.json and RUN/sweep.png, Fréchet distance against sigma_rel.

    Args:
        run: A run's folder.
        sigma_rel: The widths.
        at: Where the averages end, in images seen; by default at the last stored one.
        split: The part of the data to measure against.
        samples: How many to draw for each, of the same noise.
        batch: Images drawn at a time.
    """
    (images, resolution), about, curve = _data_of(run, split), posthoc.description(run), []
    real, _ = images.first(REAL)
    for width in sigma_rel:
        denoiser = hub.restore(about, posthoc.reconstruct(run, width, at)).to(_device()).eval()
        drawn, _ = draw(fold_weights(denoiser), about, range(samples), batch, progress=f"sigma_rel {width}")
        curve.append((width, frechet_distance(drawn, real, resolution=resolution)))
        print(f"sigma_rel {width:.3f}: Fréchet distance on pixels {curve[-1][1]:.4f}", flush=True)
    Path(run, "sweep.json").write_text(json.dumps(curve))
    pictures.curve(Path(run, "sweep.png"), curve, "sigma_rel of the average", f"Fréchet distance (pixels, {samples} samples)")


def ladder(run: str, split: str = "all", samples: int = 2000, batch: int = 500) -> None:
    """Measure every student of a progressive run beside its teacher, undistilled, at the same number of steps: RUN/ladder.md and pictures.

    Args:
        run: A run's folder.
        split: The part of the data to measure against.
        samples: How many to draw for each, of the same noise.
        batch: Images drawn at a time.
    """
    students(run)
    images, resolution = _data_of(run, split)
    print(f"\n{ladder_table(run, images.first(REAL)[0], resolution, samples, batch, _device())}\n\n{run}/ladder.png, {run}/ladder_samples.png")


def pairs(teacher: str = "runs/demo/teacher", out: str = "runs/demo/pairs", count: int = 10_000, seed: int = 0, batch: int = 500) -> None:
    """Write noise-image pairs of a teacher's deterministic sampler, for DMD's regression. Run it again to go on.

    To share the work: torchrun --nproc_per_node 8 -m trainers.cli pairs ...

    Args:
        teacher: A run's folder.
        out: The folder to write to.
        count: How many pairs.
        seed: Of their noise.
        batch: Pairs drawn at a time.
    """
    make_pairs(teacher, out, count, seed, batch, _device())


def cache(source: str, autoencoder: str, out: str = "latents", split: str = "train", resolution: int = 512, classes: int = 1000, fit: str = "crop",
          batch: int = 8, skip_bad: bool = False, workers: int = 0) -> None:
    """Encode an image set to latents, for `data.source` of a latent model. Run it again to go on.

    To share the work: torchrun --nproc_per_node 8 -m trainers.cli cache ...

    Args:
        source: Images, as in data.source.
        autoencoder: A folder or hub id of an AutoencoderKL.
        out: The folder to write to.
        split: Of the source.
        resolution: Of the images, in pixels; latents have an eighth of it.
        classes: How many, 0 to leave labels out.
        fit: "crop" or "pad", as in data.fit.
        batch: Images encoded at a time.
        skip_bad: Pass over images that do not decode.
        workers: Processes that decode ahead.
    """
    make_cache(source, autoencoder, out, split, resolution, classes, fit, batch, _device(), skip_bad, workers)


def convert(snapshot: str, out: str) -> None:
    """Read an NVlabs EDM or EDM2 snapshot (.pkl), running nothing of it, and save it as a model's folder.

    Args:
        snapshot: The file.
        out: The folder to write to.
    """
    require(snapshot.endswith(".pkl"), f"{snapshot} is not a .pkl snapshot")
    about = hub.description(snapshot)
    writable(out)
    hub.save(out, {**about, "trained": {"snapshot": snapshot}}, hub.load_denoiser(snapshot).state_dict())
    print(f"{out}: a {about['resolution']}x{about['resolution']} network of {about['channels']} channels and {about['classes']} classes")


def export(run: str, to: str = "diffusers", out: str | None = None) -> None:
    """Write a model as a folder that diffusers loads without this package; of a distilled run, each stage.

    Args:
        run: A run's folder, or a model's.
        to: "diffusers".
        out: The folder to write, or that of the stages; by default RUN/diffusers.
    """
    require(to == "diffusers", f"to is {to!r}, and diffusers is what there is")
    out = out or f"{run.removesuffix('.pkl')}/diffusers"
    for line in export_model(run, out):
        print(line)


def _device() -> str:
    """This process's own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def main() -> None:
    arguments = [re.sub("^--[a-z-]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in sys.argv[1:]]  # --sigma-rel too
    if arguments[:1] == ["demo"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments.insert(1, "--what")  # `fewstep demo progressive`: what has a default cannot stand bare for the parser
    try:
        auto_cli([demo, sample, score, pairs, cache, ema, sweep, convert, export, ladder], args=arguments, prog="fewstep", description=__doc__)
    except (ConfigError, hub.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
