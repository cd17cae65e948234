"""Patched models: parameters with an effect, a snapshot of a model, and the comparison with the oracle."""

import copy

import torch

import apt_kernels

from . import models, oracle


def randomise(model, seed=1):
    """Random prefix parameters, large enough to have an effect, with gates different from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for prefix in apt_kernels.prefixes(model).values():
            for parameter in prefix.parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
                parameter.copy_(parameter + draw * (0.3 if parameter.shape == (1,) else 0.7))


def real_of(given, family):
    """The padding mask of the tokens from which a module's gate is computed; the decoder's own input has none."""
    mask = given["attention_mask"].bool()
    return lambda name: mask if family not in models.SEQ2SEQ or ".encoder." in f".{name}" else None


def snapshot(model):
    """Everything about a model that a failed or undone patch must not change."""
    return {
        "parameters": {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "implementation": model.config._attn_implementation,
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now["parameters"].keys() == before["parameters"].keys()
    for name, (grad, tensor) in now["parameters"].items():
        assert grad == before["parameters"][name][0], name
        assert torch.equal(tensor, before["parameters"][name][1]), name
    for key in ("hooks", "training", "implementation", "attributes"):
        assert now[key] == before[key], key


def check_equals_the_oracle(family, gate, padding, device="cpu"):
    plain = models.build(family).double().to(device)
    given = {name: tensor.to(device) for name, tensor in models.inputs(family, padding).items()}
    patched = apt_kernels.patch(copy.deepcopy(plain), prefix_length=5, gate=gate, init_seed=0).double()
    randomise(patched)
    eager, params = oracle.build(plain, apt_kernels.prefixes(patched), real_of(given, family))

    logits, expected = patched(**given).logits, eager(**given).logits
    rows = torch.ones_like(logits[..., 0], dtype=torch.bool)
    if padding and family not in models.SEQ2SEQ:
        rows = given["attention_mask"].bool()
    torch.testing.assert_close(logits[rows], expected[rows], rtol=1e-9, atol=1e-9)
    bare, _ = oracle.build(plain, {})
    moved = (expected - bare(**given).logits)[rows].abs().max()
    assert moved > 1e-2, "the prefix has no influence, the comparison proves nothing"

    weight = torch.randn(logits[rows].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    (logits[rows] * weight).sum().backward()
    (expected[rows] * weight).sum().backward()
    named = dict(patched.named_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == set(params)
    for name, parameter in params.items():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)
