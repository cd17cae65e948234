"""Gates are entries of one table, which settings and messages use; a new gate is one entry."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

import apt_kernels
from apt_kernels.prefix import gates
from helpers import models
from helpers.patched import randomise

ROOT = Path(__file__).parents[2]
MODULE = {"name": "layer", "kind": "self-attention", "causal": False, "cross": False, "repeated": False}


def site(**change):
    return SimpleNamespace(**{**MODULE, "hidden_size": 8, **change})


def test_settings_types_and_documentation_have_every_gate():
    assert get_args(gates.GateName) == ("auto", *gates.names())
    assert ("auto", *gates.names()) == apt_kernels.config.GATES
    method = (ROOT / "docs" / "method.md").read_text()
    settings = " ".join(apt_kernels.AptConfig.__doc__.split())
    for name in gates.names():
        assert f"| `{name}` |" in method, f"docs/method.md has no row for {name}"
        assert f'``"{name}"``: {gates.find(name).documentation}' in settings, f"AptConfig's docstring lacks {name}"


@pytest.mark.parametrize("name", gates.names())
def test_logits_have_the_axes_that_the_entry_says(name):
    gate, sizes = gates.find(name), {"B": 2, "T": 5, "M": 3}
    prefix = apt_kernels.AdaptivePrefix(3, 1, 4, 4, 8, name)
    hidden, segments = torch.randn(2, 5, 8), torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
    for given, axes in ((None, gate.axes), (segments, "BTM" if gate.axes == "BM" else gate.axes)):
        logits = prefix.logits(hidden, None, given)
        assert (() if logits is None else tuple(logits.shape)) == tuple(sizes[axis] for axis in axes)
    trained = {part for part in ("gate_weight", "gate_logits") if getattr(prefix, part) is not None}
    assert trained == ({gate.parameter} if gate.parameter else set())


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, "first"), ({"causal": True}, "token"), ({"cross": True}, "token"), ({"hidden_size": None}, "static")],
)
def test_the_automatic_gate(change, expected):
    assert gates.resolve("auto", site(**change)).name == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mean", {"causal": True}, "see later ones; use 'first', 'token', 'static' or 'none'"),
        ("mean", {"cross": True}, "see later ones; use 'first', 'token', 'static' or 'none'"),
        ("first", {"causal": True, "repeated": True}, "more than once .* use 'token', 'static' or 'none'"),
        ("token", {"hidden_size": None}, "one hidden state for every query; use 'static' or 'none'"),
    ],
)
def test_a_refusal_says_why_and_names_the_gates_that_are_allowed(name, change, message):
    with pytest.raises(apt_kernels.ConfigError, match=f"gate is '{name}', but layer .*{message}"):
        gates.resolve(name, site(**change))


class Last(gates.Gate):
    """A gate for the dry run: the last real token's hidden state."""

    name = "last"
    documentation = "the last real token's hidden state, one gate for each sequence"
    axes = "BM"

    def obstacle(self, site):
        return f"{site.name} is causal" if site.causal else super().obstacle(site)

    def states(self, hidden_states, real_tokens, segments):
        if real_tokens is None:
            return hidden_states[:, -1]
        position = torch.arange(real_tokens.shape[1], device=real_tokens.device)
        last = torch.where(real_tokens, position, -1).amax(dim=1)
        return hidden_states[torch.arange(len(last)), last]


def test_a_new_gate_is_one_entry(monkeypatch, tmp_path):
    """Settings, patching, training, saving, loading and messages support a gate that no other file names."""
    monkeypatch.setitem(gates._GATES, "last", Last())
    given = models.inputs("bert", "right")
    model = apt_kernels.patch(models.build("bert"), prefix_length=4, gate="last").eval()
    randomise(model)
    model(**given)[0].sum().backward()
    found = apt_kernels.prefixes(model)
    assert all(prefix.gate == "last" and prefix.gate_weight.grad.abs().max() > 0 for prefix in found.values())
    apt_kernels.save(model, tmp_path)
    twin = apt_kernels.load(models.build("bert"), tmp_path).eval()
    assert torch.equal(twin(**given)[0], model(**given)[0])
    # Padding is not read: a row with it gives what the row alone gives.
    alone = {name: rows[:1, : int(given["attention_mask"][0].sum())] for name, rows in given.items()}
    torch.testing.assert_close(model(**given)[0][0, : alone["input_ids"].shape[1]], model(**alone)[0][0])
    with pytest.raises(apt_kernels.ConfigError, match=r"gate is 'last', but .* is causal; use 'first', 'token'"):
        apt_kernels.patch(models.build("llama"), gate="last")
    with pytest.raises(apt_kernels.ConfigError, match="'none', 'last'"):
        apt_kernels.AptConfig(gate="frist")
