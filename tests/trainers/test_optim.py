"""Learning rates by images seen, and the optimizer's groups and refusals."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from trainers.optim import OptimConfig, build_optimizer, inverse_sqrt_lr, learning_rate


@pytest.mark.parametrize("images, wanted", [
    (0, 0.0), (500, 0.005), (1000, 0.01), (5000, 0.01), (6400, 0.01), (25_600, 0.005), (160_000, 0.002)])
def test_schedule_ramps_holds_and_decays(images, wanted):
    """Linear to rampup_images, constant to ref_batches batches, then 1 / sqrt(images)."""
    assert inverse_sqrt_lr(images, batch=64, ref_lr=0.01, ref_batches=100, rampup_images=1000) == pytest.approx(wanted, rel=1e-12)


def test_zero_turns_a_part_off():
    """Without ramp the first step has the full rate; without decay the last has; a constant is both."""
    assert inverse_sqrt_lr(0, 64, 0.01, 100, 0) == 0.01
    assert inverse_sqrt_lr(10**12, 64, 0.01, 0, 1000) == 0.01
    assert learning_rate(OptimConfig(lr=0.3), 0) == learning_rate(OptimConfig(lr=0.3), 10**12) == 0.3


def test_learning_rate_reads_the_config_in_images():
    """decay_after_images and warmup_images are counts of images, whatever the batch."""
    config = OptimConfig(lr=0.02, warmup_images=400, decay_after_images=2500)
    found = [learning_rate(config, images) for images in (0, 100, 400, 2500, 10_000)]
    assert found == pytest.approx([0, 0.005, 0.02, 0.02, 0.01], rel=1e-12)


def network():
    torch.manual_seed(0)
    net = nn.ModuleDict({"denoiser": nn.Linear(3, 2), "disc": nn.Linear(3, 2), "discount": nn.Linear(3, 2)})
    net["denoiser"].bias.requires_grad_(False)
    net["disc"].bias.requires_grad_(False)
    return net


def test_head_has_its_own_rate_and_frozen_parameters_none():
    """Parameters under "disc." form a group with disc_lr_scale; every trainable one is in one group, and no frozen one in any."""
    net = network()
    groups = build_optimizer(net, OptimConfig(disc_lr_scale=0.2)).param_groups
    names = {p: name for name, p in net.named_parameters()}
    found = {group["lr_scale"]: sorted(names[p] for p in group["params"]) for group in groups}
    assert found == {1.0: ["denoiser.weight", "discount.bias", "discount.weight"], 0.2: ["disc.weight"]}


def test_one_rate_makes_one_group():
    """With disc_lr_scale 1 nothing is split, and a network without a head has no empty group."""
    assert [len(g["params"]) for g in build_optimizer(network(), OptimConfig()).param_groups] == [4]
    assert [g["lr_scale"] for g in build_optimizer(nn.Linear(2, 2), OptimConfig(disc_lr_scale=0.2)).param_groups] == [1.0]


def step(net, optimizer, value, refused):
    for p in net.parameters():
        p.grad = torch.full_like(p, value)
    optimizer.found_inf = torch.tensor(float(refused))
    optimizer.step()


def snapshot(net, optimizer):
    tensors = [*net.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    return [v.detach().clone() for v in tensors]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1.0])
def test_refused_step_leaves_everything_alone(value):
    """Where found_inf is 1 no weight, moment or step count changes, weight decay included."""
    net = nn.Linear(3, 2)
    optimizer = build_optimizer(net, OptimConfig(lr=0.1, weight_decay=0.1))
    step(net, optimizer, 0.5, refused=False)
    before = snapshot(net, optimizer)
    step(net, optimizer, value, refused=True)
    assert len(before) == 2 + 2 * 3 and all(torch.equal(a, b) for a, b in zip(before, snapshot(net, optimizer)))
    step(net, optimizer, 0.5, refused=False)
    assert not torch.equal(before[0], net.weight)


def test_run_after_a_refused_first_step_is_as_if_it_had_not_been():
    """A refused first step leaves bias correction at its start: what follows is bit for bit the run without it."""
    plain = nn.Linear(3, 2)
    refused = deepcopy(plain)
    for net, first in ((plain, False), (refused, True)):
        optimizer = build_optimizer(net, OptimConfig(lr=0.1))
        if first:
            step(net, optimizer, float("nan"), refused=True)
        for value in (0.5, -0.2, 0.1):
            step(net, optimizer, value, refused=False)
    assert torch.equal(plain.weight, refused.weight) and torch.equal(plain.bias, refused.bias)


def test_adamw_is_what_the_config_says():
    """The first AdamW step is p (1 - lr decay) - lr g / (|g| + eps)."""
    net = nn.Linear(1, 1, bias=False)
    start = net.weight.item()
    optimizer = build_optimizer(net, OptimConfig(lr=0.1, weight_decay=0.5, eps=0.25))
    step(net, optimizer, 0.75, refused=False)
    assert net.weight.item() == pytest.approx(start * (1 - 0.1 * 0.5) - 0.1 * 0.75 / (0.75 + 0.25), rel=1e-6)
