"""What a step of EDM2 costs, and what each choice in it saves: python benchmarks/edm2_step.py

The reference is the same step written plainly: weights normalised in a loop before each forward, attention by explicit products and
softmax, resampling by convolution, Adam and two averages parameter by parameter. Every pair is timed in turn in one run, as the
machine's speed drifts; a ratio is the median of plain / ours. Numerics are equal: the largest difference of the two outputs is printed.
On a GPU the step's matrix rate is given as a share of what a large matrix product reaches there.

Figures that were measured: docs/results.md.
"""

import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.denoiser import Denoiser, ScoreModel
from models.edm2_unet import EDM2UNet, LogVar, fold_weights, normalize, resample, unit_norm_weights
from models.schedules import EDM
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Cluster, Engine
from trainers.launch import PRECISIONS, Plan
from trainers.losses import edm2_loss
from trainers.optim import OptimConfig

NETWORKS = {
    "small": dict(img_resolution=32, img_channels=3, label_dim=10, model_channels=64, channel_mult=(1, 2, 2), num_blocks=2),  # 7M
    "s64": dict(img_resolution=64, img_channels=3, label_dim=1000),  # the published S at 64x64, 280M
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(settings: dict) -> ScoreModel:
    torch.manual_seed(0)
    model = ScoreModel(Denoiser(EDM2UNet(**settings), EDM(), "edm", LogVar())).to(DEVICE)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.5)
    return model


def seconds(function: Callable) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(what: str, plain: Callable, ours: Callable, rounds: int) -> float:
    """Print and return the median ratio of times, and print both."""
    plain(), ours()
    times = [(seconds(plain), seconds(ours)) for _ in range(rounds)]
    ratio = median(p / o for p, o in times)
    print(f"{what:44} plain {1e3 * median(p for p, _ in times):9.2f} ms, ours {1e3 * median(o for _, o in times):9.2f} ms, ratio {ratio:.2f}", flush=True)
    return median(o for _, o in times)


class PlainStep:
    """The step in its simplest form, on a network of its own."""

    def __init__(self, model: ScoreModel, precision: str):
        self.model, self.precision = model, precision
        self.weights = [p for name, p in model.named_parameters() if name in set(unit_norm_weights(model))]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), foreach=False, fused=False)
        self.averages = [[p.detach().clone() for p in model.parameters()] for _ in range(2)]

    def __call__(self, batch: tuple) -> Tensor:
        self.force()
        low = torch.autocast(DEVICE.type, PRECISIONS[self.precision], cache_enabled=False) if self.precision != "no" else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), low:
            loss = loss_of(self.model, batch)
        loss.backward()
        for p in self.model.parameters():
            p.grad.nan_to_num_(0, 0, 0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()
        return loss.detach()

    @torch.no_grad()
    def force(self) -> None:
        for p in self.weights:
            p.copy_(normalize(p))

    @torch.no_grad()
    def average(self) -> None:
        for average in self.averages:
            for a, p in zip(average, self.model.parameters()):
                a.lerp_(p, 1e-4)


def loss_of(model: Callable, batch: tuple) -> Tensor:
    x0, sigma, eps, cond = batch
    score = model(x0 + sigma.view(-1, 1, 1, 1) * eps, sigma, cond)
    return edm2_loss(score.x0, x0, sigma, score.logvar, 0.5).mean() * x0[0].numel()


def resampling(channels: int, resolution: int, batch: int, rounds: int) -> None:
    x = torch.randn(batch, channels, resolution, resolution, device=DEVICE)
    kernel = torch.ones((channels, 1, 2, 2), device=DEVICE)
    compare("halving: convolution / pooling", lambda: nn.functional.conv2d(x, kernel / 4, stride=2, groups=channels),
            lambda: resample(x, "down", (1, 1)), rounds)
    compare("doubling: transposed convolution / repeating", lambda: nn.functional.conv_transpose2d(x, kernel, stride=2, groups=channels),
            lambda: resample(x, "up", (1, 1)), rounds)


def attention(batch: int, rounds: int) -> None:
    q, k, v = torch.randn(3, batch, 4, 256, 64, device=DEVICE).unbind()

    def plain():
        return ((q @ k.transpose(-1, -2)) / 8).softmax(-1) @ v

    compare("attention: products and softmax / SDPA", plain, lambda: nn.functional.scaled_dot_product_attention(q, k, v), rounds)


def passes_without_gradient(settings: dict, batch: tuple, rounds: int) -> None:
    x0, sigma, _, cond = batch
    plain, folded = network(settings).denoiser.eval(), fold_weights(network(settings).denoiser.eval())
    last = fold_weights(network(settings).denoiser.eval()).to(memory_format=torch.channels_last)
    with torch.no_grad():
        few = slice(0, 2)
        small = (x0[few], sigma[few], {"labels": cond["labels"][few]})
        compare("frozen pass, batch 2: normalising / folded", lambda: plain(*small), lambda: folded(*small), rounds)
        compare(f"frozen pass, batch {len(x0)}: normalising / folded", lambda: plain(x0, sigma, cond), lambda: folded(x0, sigma, cond), rounds)
        x_last = x0.to(memory_format=torch.channels_last)
        compare("frozen pass: NCHW / channels_last", lambda: folded(x0, sigma, cond), lambda: last(x_last, sigma, cond), rounds)
        gaps = [(plain(x0, sigma, cond) - other).abs().max().item() for other in (folded(x0, sigma, cond), last(x_last, sigma, cond))]
    print(f"{'':44} largest difference: folded {gaps[0]:.1e}, channels_last {gaps[1]:.1e}")


def whole_step(settings: dict, batch: tuple, precision: str, compiled: bool, rounds: int) -> None:
    cluster = Cluster(("network",), Plan("benchmark", precision=precision, compiler="inductor" if compiled else None))
    model = network(settings)
    engine = Engine(cluster, "network", model, OptimConfig(lr=1e-2, betas=(0.9, 0.99)), len(batch[0]), unit_norm_weights(model))
    ema, plain = ShardedEMA(engine, EmaConfig((0.05, 0.1))), PlainStep(network(settings), precision)

    def ours() -> Tensor:
        metrics = engine.update(lambda b: {"loss": loss_of(engine, b)}, [batch])
        ema.update(10_000, len(batch[0]))
        return metrics["loss"]

    print(f"first loss: plain {plain(batch).item():.6f}, ours {ours().item():.6f}; second: {plain(batch).item():.6f}, {ours().item():.6f}")
    step = compare("whole step: plain / ours" + (", compiled" if compiled else ""), lambda: plain(batch), ours, rounds)
    whole = seconds(lambda: engine.update(lambda b: {"loss": loss_of(engine, b)}, [batch]))
    compare("two averages: loop / foreach", plain.average, lambda: ema.update(10_000, len(batch[0])), rounds)
    print(f"{'':44} averages are {100 * seconds(lambda: ema.update(10_000, len(batch[0]))) / whole:.2f} % of the step")
    compare("forced weight normalisation: loop / ours", plain.force, engine._project, rounds)
    for optimizer in (plain.optimizer, engine.optimizer):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
    compare("Adam: loop / fused", plain.optimizer.step, engine.optimizer.step, rounds)
    report(model, batch, step, precision)


def report(model: nn.Module, batch: tuple, step: float, precision: str) -> None:
    """Images a second, peak memory and, on a GPU, the share of its matrix rate."""
    cuda = DEVICE.type == "cuda"
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(batch[0]) / step:.1f} images/s, peak memory of both networks {memory:.2f} GiB")
    if cuda:
        with FlopCounterMode(display=False) as counter:
            loss_of(model, batch).backward()
        n, a = 8192, torch.randn(8192, 8192, device=DEVICE, dtype=PRECISIONS[precision])
        a @ a
        peak = 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(10))
        rate = counter.get_total_flops() / step
        print(f"{rate / 1e12:.1f} TFLOP/s of {peak / 1e12:.1f} that a product of {n}x{n} matrices reaches: {100 * rate / peak:.1f} %")


def main(size: str = "small", batch: int = 16, precision: str = "no", compiled: bool = False, rounds: int = 7, threads: int = 1) -> None:
    """Time a step and its parts.

    Args:
        size: "small" (7M parameters, 32x32) or "s64" (the published S at 64x64).
        batch: Images a step.
        precision: "no", "bf16" or "fp16".
        compiled: Whether our step goes through torch.compile.
        rounds: Of each comparison.
        threads: On a CPU.
    """
    torch.set_num_threads(threads)
    settings = NETWORKS[size]
    shape = (batch, settings["img_channels"], settings["img_resolution"], settings["img_resolution"])
    labels = {"labels": torch.arange(batch, device=DEVICE) % settings["label_dim"]}
    inputs = (0.5 * torch.randn(shape, device=DEVICE), torch.linspace(-3, 2, batch, device=DEVICE).exp(), torch.randn(shape, device=DEVICE), labels)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {threads} thread(s)"
    print(f"{size}, batch {batch}, precision {precision}, {where}, torch {torch.__version__}")
    resampling(settings["model_channels"] if "model_channels" in settings else 192, settings["img_resolution"], batch, rounds)
    attention(batch, rounds)
    passes_without_gradient(settings, inputs, rounds)
    whole_step(settings, inputs, precision, compiled, rounds)


if __name__ == "__main__":
    auto_cli(main)
