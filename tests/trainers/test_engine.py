"""Engines in one process; tests/test_distributed.py has them on several."""

import copy

import pytest
import torch
from torch import nn

from conftest import tiny_denoiser
from models.denoiser import ScoreModel
from models.edm2_unet import EPS, unit_norm_weights
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Cluster, Engine, _row_pieces
from trainers.launch import LaunchError, Plan
from trainers.optim import OptimConfig, build_optimizer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x, t, cond=None):
        return self.b(torch.tanh(self.a(x) + t[:, None]))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def data(n=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g), torch.rand(n, generator=g)


def config_file(tmp_path, precision):
    path = tmp_path / f"{precision}.yaml"
    path.write_text(f'distributed_type: "NO"\nmixed_precision: "{precision}"\nuse_cpu: {str(not torch.cuda.is_available()).lower()}\nnum_processes: 1\n')
    return str(path)


def engine(config=OptimConfig(lr=0.01), module=None, accelerate_config=None, **options):
    cluster = Cluster(("net",), Plan.read(accelerate_config))
    return Engine(cluster, "net", module or net(), config, 8, **options)


def squares(e):
    def loss(batch):
        x, t = (v.to(e.cluster.device) for v in batch)
        return {"loss": (e(x, t) - x).square().mean()}
    return loss


def weights(e):
    return {n: p.detach().float().cpu().clone() for n, p in e.module.named_parameters()}


def same(a, b, tolerance=0.0):
    return all((a[k] - b[k]).abs().max() <= tolerance for k in a)


def test_update_is_plain_training_with_clipping():
    """Three updates equal a hand-written AdamW loop with the same clip, and the norm is the one before clipping."""
    config = OptimConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, clip=0.05)
    e, reference = engine(config), net().to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(3):
        x, t = (v.to(e.cluster.device) for v in data(seed=step))
        metrics = e.update(squares(e), [(x, t)])
        (reference(x, t) - x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        assert norm > 0.05 and torch.allclose(metrics["grad_norm"], norm)
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(e), {n: p.detach().cpu() for n, p in reference.named_parameters()}, 1e-6)


def test_accumulation_equals_one_batch():
    """Four microbatches of two are one batch of eight."""
    x, t = data()
    whole, parts = engine(OptimConfig(lr=0.01, clip=0.1)), None
    parts = Engine(whole.cluster, "net", net(), OptimConfig(lr=0.01, clip=0.1, accumulation=4), 2)
    for _ in range(3):
        a = whole.update(squares(whole), [(x, t)])
        b = parts.update(squares(parts), list(zip(x.split(2), t.split(2))))
        assert torch.allclose(a["loss"], b["loss"]) and torch.allclose(a["grad_norm"], b["grad_norm"])
    assert same(weights(whole), weights(parts), 1e-6)


def test_wrong_number_of_microbatches_is_refused():
    """An engine that accumulates twice does not take one microbatch for an update."""
    e = engine(OptimConfig(accumulation=2))
    with pytest.raises(ValueError, match="accumulates 2 microbatches and got 1"):
        e.update(squares(e), [data()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(bad):
    """Weights and moments stay as they were, it is counted, and the next update is as if nothing had happened."""
    e = engine()
    clean = Engine(e.cluster, "net", net(), OptimConfig(lr=0.01), 8)
    for who in (e, clean):
        who.update(squares(who), [data(seed=1)])
    before = weights(e)
    for _ in range(2):
        e.update(lambda batch: {"loss": squares(e)(batch)["loss"] * 0 + bad}, [data(seed=2)])  # a finite gradient under a bad loss
    assert same(before, weights(e)) and e.refusals.tolist() == [2, 2, 2]
    for who in (e, clean):
        who.update(squares(who), [data(seed=3)])
    assert same(weights(e), weights(clean)) and e.refusals.tolist() == [0, 2, 2]


def test_frozen_lets_gradient_through_and_keeps_none():
    """A loss through a frozen network has the same input gradient, and leaves no gradient in its parameters."""
    e = engine()
    x, t = (v.to(e.cluster.device) for v in data())
    expected = torch.autograd.grad(e.module(y := x.clone().requires_grad_(), t).sum(), y)[0]
    x.requires_grad_()
    with e.frozen():
        e(x, t).sum().backward()
        assert not any(p.requires_grad for p in e.parameters)
    assert torch.equal(x.grad, expected) and all(p.grad is None for p in e.parameters)
    with pytest.raises(RuntimeError), e.frozen():
        raise RuntimeError
    assert all(p.requires_grad for p in e.parameters) and not e.is_frozen


def test_forced_weight_normalisation_takes_the_gradient_at_the_normalised_weight():
    """Updates equal the published algorithm: normalise the stored weight, differentiate there, step, store what Adam left."""
    module = ScoreModel(tiny_denoiser())
    config = OptimConfig(lr=0.02, betas=(0.9, 0.99), eps=1e-3)  # a large eps, or Adam blows rounding up to whole steps
    e = engine(config, copy.deepcopy(module), unit_norm=unit_norm_weights(module))
    reference, names = module.to(e.cluster.device), set(unit_norm_weights(module))
    optimizer = build_optimizer(reference, config)

    def objective(network):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(4, 1, 8, 8, generator=g).to(e.cluster.device)
        score = network(x, torch.full((4,), 2.0, device=x.device), {"labels": torch.tensor([0, 1, 2, 3], device=x.device)})
        return (score.x0 - x).square().mean() + score.logvar.square().mean()

    for _ in range(3):
        e.update(lambda _: {"loss": objective(e)}, [None])
        with torch.no_grad():
            for name, p in reference.named_parameters():
                if name in names:
                    p.copy_(p / (EPS + p.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (p.ndim - 1))))
        objective(reference).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(e), {n: p.detach().cpu() for n, p in reference.named_parameters()}, 2e-6)
    stored = [p.detach().flatten(1).square().mean(1).sqrt() for n, p in e.module.named_parameters() if n in names]
    assert max((rms - 1).abs().max() for rms in stored) > 1e-4  # at rest they are what Adam left, as the averages want them


def test_row_pieces_cover_any_slice_row_by_row():
    """Pieces of a slice of a flattened matrix, put together, are that slice, and each lies in the rows it claims."""
    flat = torch.arange(35.0)
    for start in range(35):
        for stop in range(start + 1, 36):
            seen = []
            for first, piece in _row_pieces(flat[start:stop], start, (7, 5)):
                for k, row in enumerate(piece):
                    assert (row // 5 == first + k).all()
                    seen += row.tolist()
            assert seen == list(range(start, stop))


def test_bfloat16_keeps_float32_masters_and_averages(tmp_path):
    """Steps below bfloat16's resolution move the masters, and an average at 0.9999 follows them."""
    e = engine(OptimConfig(lr=1e-4), accelerate_config=config_file(tmp_path, "bf16"))
    ema = ShardedEMA(e, EmaConfig(sigma_rel=(), halflife=(70_000.0,)))
    before, average = weights(e), [a.clone() for a in ema.averages["halflife-70000"]]
    for step in range(50):
        e.update(squares(e), [data(seed=step)])
        ema.update(10_000_000 + 8 * step, 8)
    assert e(*(v.to(e.cluster.device) for v in data())).dtype == torch.bfloat16
    assert all((before[n] - w).abs().max() > 1e-4 for n, w in weights(e).items())
    assert all(s.tensor.dtype == torch.float32 for s in e.master_shards())
    assert all(not torch.equal(a, b) for a, b in zip(average, ema.averages["halflife-70000"]))


def test_a_pass_without_gradient_does_not_cut_a_later_gradient_under_autocast(tmp_path):
    """The no_grad rollout before a bfloat16 update changes nothing (autocast's cache of weight casts would)."""
    path = config_file(tmp_path, "bf16")
    e = engine(accelerate_config=path)
    other = Engine(e.cluster, "net", net(), OptimConfig(lr=0.01), 8)

    def with_rollout(batch):
        with torch.no_grad():
            other(*(v.to(e.cluster.device) for v in batch))
        return squares(other)(batch)

    a, b = e.update(squares(e), [data()]), other.update(with_rollout, [data()])
    assert a["grad_norm"] > 0 and torch.equal(a["grad_norm"], b["grad_norm"]) and same(weights(e), weights(other))


def test_each_fp16_engine_has_its_own_loss_scale(tmp_path):
    """An overflow in one engine halves its scale, refuses its step, and leaves the other alone."""
    e = engine(accelerate_config=config_file(tmp_path, "fp16"))
    other = Engine(e.cluster, "net", net(), OptimConfig(lr=0.01), 8)
    before = weights(e)
    e.update(lambda batch: {"loss": squares(e)(batch)["loss"] * 1e36}, [data()])
    other.update(squares(other), [data()])
    assert e.scaler.get_scale() == other.scaler.get_scale() / 2 and same(before, weights(e)) and not same(before, weights(other))


def test_master_shards_hold_every_parameter_once_and_stay_current():
    """Shards are views: after an update they show the new weights, and gathered they are the module."""
    e = engine()
    e.update(squares(e), [data()])
    assert same(e.gather(e.master_shards()), weights(e))
    assert sum(len(s.tensor) for s in e.master_shards()) == sum(p.numel() for p in e.parameters)


def test_average_follows_the_masters():
    """The gathered average of a run is the hand-written recursion over its weights."""
    e = engine()
    ema = ShardedEMA(e, EmaConfig(sigma_rel=(0.1,)))
    expected = weights(e)
    for step in range(1, 6):
        e.update(squares(e), [data(seed=step)])
        ema.update(8 * step, 8)
        beta = (1 - 1 / step) ** (6.93720393 + 1)
        expected = {n: torch.lerp(expected[n], w, 1 - beta) for n, w in weights(e).items()}
    assert same(expected, ema.gather("power-0.100"), 1e-6)


def test_state_round_trip_goes_on_bit_for_bit():
    """Weights, moments and steps through `state` and `load`: the next update is the same."""
    e = engine()
    for step in range(3):
        e.update(squares(e), [data(seed=step)])
    kinds, scalars = e.state()
    stored = {(kind, s.name): s.tensor.clone() for kind, shards in kinds.items() for s in shards}
    other = Engine(e.cluster, "net", net(seed=5), OptimConfig(lr=0.01), 8)
    other.load(lambda kind, name, start, length: stored[kind, name][start:start + length], scalars)
    for who in (e, other):
        who.update(squares(who), [data(seed=9)])
    assert same(weights(e), weights(other))


@pytest.mark.parametrize("content, said", [
    ("distributed_type: FSDP\n", "distributed_type is FSDP, and must be"),
    ("- 1\n", "distributed_type is missing"),
    ("a: [\n", "not YAML"),
    ('distributed_type: "NO"\nmixed_precision: fp8\n', "mixed_precision is fp8"),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 4}\n", "zero_stage is 4"),
    ('distributed_type: "NO"\ndynamo_config: {dynamo_backend: INDUCTR}\n', "dynamo_backend is inductr"),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\ndynamo_config: {dynamo_backend: INDUCTOR}\n", "take zero_stage 2"),
])
def test_bad_accelerate_configurations_are_one_sentence(tmp_path, content, said):
    """Each names the file, the value and what it must be."""
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(LaunchError, match=said) as error:
        Plan.from_file(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_launchers_environment_says_the_same_as_the_file(monkeypatch, tmp_path):
    """A plan from what `accelerate launch --config_file` exports equals one from --config."""
    for key, value in {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_MIXED_PRECISION": "bf16",
                       "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DYNAMO_BACKEND": "NO"}.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "c.yaml").write_text("distributed_type: DEEPSPEED\nmixed_precision: bf16\n"
                                     "deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu, offload_param_device: none}\n"
                                     "dynamo_config: {dynamo_backend: no}\n")
    a, b = Plan.from_environment(), Plan.from_file(str(tmp_path / "c.yaml"))
    assert (a.zero_stage, a.precision, a.deepspeed, a.compiler) == (b.zero_stage, b.precision, b.deepspeed, b.compiler) == \
        (3, "bf16", {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}, None)


def test_compiled_training_is_training(tmp_path):
    """A launch with a dynamo backend compiles the network once, and its updates are those of a launch without."""
    from torch._dynamo.utils import counters

    (tmp_path / "c.yaml").write_text('distributed_type: "NO"\nuse_cpu: true\ndynamo_config: {dynamo_backend: AOT_EAGER}\n')
    ends = []
    for plan in (Plan("test"), Plan.from_file(str(tmp_path / "c.yaml"))):
        torch._dynamo.reset()
        counters.clear()
        e = Engine(Cluster(("net",), plan), "net", net(), OptimConfig(lr=0.01), 8)
        for step in range(3):
            e.update(squares(e), [data(seed=step)])
        ends.append((weights(e), counters["stats"]["unique_graphs"]))
    assert same(ends[0][0], ends[1][0], 1e-6) and [graphs for _, graphs in ends] == [0, 1]


def test_a_tracker_that_is_not_there_is_one_sentence(tmp_path):
    """It is refused with those that are; "none" tracks nothing."""
    with pytest.raises(LaunchError, match="loop.tracker is wandbb, and installed here are .*tensorboard"):
        Cluster(("net",), Plan("test"), str(tmp_path), "wandbb")
    assert not Cluster(("net",), Plan("test"), str(tmp_path), "none").tracking and not list(tmp_path.iterdir())
