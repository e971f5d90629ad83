"""The EDM2 network under torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from conftest import tiny_denoiser


@pytest.mark.parametrize("features", [False, "only"])
@pytest.mark.parametrize("training", [False, True])
def test_no_graph_break_and_no_recompilation(training, features):
    """One graph holds the whole denoiser, and serves every noise level, label and set of weights of the same shapes."""
    torch._dynamo.reset()
    denoiser = tiny_denoiser().train(training)
    counter = CompileCounter()
    compiled = torch.compile(denoiser, backend=counter, fullgraph=True)  # fullgraph: a break is an error
    for step in range(4):
        x, t = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1
        cond = {"labels": torch.randint(-1, 10, (4,))}
        expected, found = denoiser(x, t, cond, features=features), compiled(x, t, cond, features=features)
        if features == "only":
            expected, found = expected[1], found[1]
        assert torch.allclose(expected, found, atol=1e-5)
        if training:
            found.square().mean().backward()
            with torch.no_grad():
                for p in denoiser.parameters():
                    p.add_(0.01)
    assert counter.frame_count == 1
