"""The reader in docs/adapter-format.md suffices: with it, an unpatched model computes what the patched one does."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import apt_kernels
from helpers import documentation, models
from helpers.patched import randomise

PAGE = documentation.ROOT / "docs" / "adapter-format.md"
NAME = "reader_of_the_page"


@pytest.fixture
def reader():
    blocks = [code for _, code in documentation.python_blocks(PAGE) if "def read(" in code]
    namespace = {}
    exec(compile(blocks[0], str(PAGE), "exec"), namespace)
    return namespace


def test_it_is_short(reader):
    code = next(code for _, code in documentation.python_blocks(PAGE) if "def read(" in code)
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 30


@pytest.mark.parametrize(
    ("family", "gate"),
    [
        ("llama", "token"),
        ("llama", "first"),
        ("qwen3", "static"),
        ("bert", "first"),
        ("bert", "mean"),
        ("gpt2", "none"),
    ],
)
def test_an_unpatched_model_with_the_reader(family, gate, reader, tmp_path):
    model, base = models.build(family), models.build(family)
    apt_kernels.patch(model, prefix_length=5, gate=gate)
    randomise(model)
    apt_kernels.save(model, tmp_path)
    settings, tensors = reader["read"](tmp_path / "adapter.safetensors")
    assert settings["gate"] == gate
    given = models.inputs(family, "right")
    real, hidden = given["attention_mask"].bool(), {}
    names = {module: name for name, module in base.named_modules()}

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        start = f"{names[module]}.apt."
        part = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        assert part["key"].shape[1] == settings["lengths"][names[module]]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        g = reader["factors"](part, gate, hidden[module], real)
        return reader["attend"](query, key, value, visible, scaling, part, g).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(
        NAME,
        lambda *args, **kwargs: sdpa_mask(
            *args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        ),
    )
    for module in base.modules():
        module.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.update(
                {module: kwargs.get("hidden_states", args[0] if args else None)}
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        bare = base(**given).logits
        base.set_attn_implementation(NAME)
        found, expected = base(**given).logits, model(**given).logits
    assert (expected - bare)[real].abs().max() > 1e-2
    # Two orders of summation in float32, of logits up to some tens.
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
