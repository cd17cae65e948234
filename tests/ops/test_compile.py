"""`torch.compile` of whole models: one graph for every length."""

import pytest
import torch

import apt_kernels
from helpers import models
from helpers.patched import randomise


@pytest.mark.proves("torch.compile, dynamic lengths")
@pytest.mark.parametrize(
    ("family", "dynamic"),
    [(family, None) for family in (models.FAMILIES if models.EVERY else ["llama"])] + [("bert", True)],
)
def test_lengths_share_their_graphs(family, dynamic):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = apt_kernels.patch(models.build(family), prefix_length=4)
    randomise(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    lengths = (7, 9, 12, 14, 15, 17, 20, 21)
    for length in lengths:
        given = {**models.inputs(family, "right", length=length), "use_cache": False}
        if family in models.ENCODERS:
            del given["use_cache"]
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    # The first length, the general graph, and at most one more where the CPU's strategy changes with the length.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def training_steps(family, lengths, **options):
    """Compare losses and gradients with eager steps; return the number of graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = apt_kernels.patch(models.build(family).train(), prefix_length=4).to(options.pop("device", "cpu"))
    randomise(model)
    compiled = torch.compile(model, **options)
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    for length in lengths:
        given = {n: tensor.to(device) for n, tensor in models.inputs(family, "right", length=length).items()}
        if family not in models.ENCODERS:
            given["use_cache"] = False
        steps = []
        for each in (compiled, model):
            model.zero_grad()
            logits = each(**given).logits
            logits.square().mean().backward()
            steps.append([logits.detach().clone(), *[p.grad.clone() for p in trained]])
        torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
        assert all(grad.abs().max() > 0 for grad in steps[1][1:])
        with torch.no_grad(), apt_kernels.disabled(model):
            assert (model(**given).logits - steps[1][0]).abs().max() > 1e-2, "the prefix has no influence"
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.proves("torch.compile of training steps, dynamic lengths, no recompilation per length")
@pytest.mark.parametrize(
    ("family", "dynamic"),
    [(family, None) for family in (models.FAMILIES if models.EVERY else ["llama"])] + [("bert", True)],
)
def test_training_steps_share_their_graphs(family, dynamic):
    lengths = (7, 9, 12, 14, 17, 21)
    assert training_steps(family, lengths, fullgraph=True, dynamic=dynamic, backend="aot_eager") <= 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.proves("CUDA graphs")
@pytest.mark.parametrize("family", models.FAMILIES if models.EVERY else ["llama", "bert"])
def test_cuda_graphs(family):
    """``reduce-overhead`` captures the steps: nothing in them may wait for the device."""
    assert training_steps(family, (12, 12, 12), device="cuda", fullgraph=True, mode="reduce-overhead") == 1
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
