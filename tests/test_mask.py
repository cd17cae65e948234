"""`Mask`: the parts combine and move as the docstring says."""

import copy
import inspect
import pickle
from dataclasses import fields, replace

import pytest
import torch

from apt_kernels import ArgumentError, Mask


def brute(mask, batch, queries, keys):
    """Visibility, one entry at a time."""
    seen = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    left, right = mask.window if mask.window else (None, None)
    for b in range(batch):
        offset = keys - queries if mask.query_offset is None else mask.query_offset
        offset = int(offset[b]) if isinstance(offset, torch.Tensor) else offset
        for q in range(queries):
            for k in range(keys):
                ok = not mask.causal or k <= q + offset
                ok &= left is None or k >= q + offset - left
                ok &= right is None or k <= q + offset + right
                ok &= mask.key_padding is None or bool(mask.key_padding[b, k])
                ok &= mask.query_segments is None or bool(mask.query_segments[b, q] == mask.key_segments[b, k])
                seen[b, 0, q, k] = ok
    return seen


def test_visible_equals_the_definition():
    padding = torch.tensor([[True] * 6, [False, False, True, True, True, False]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])
    for mask in (
        Mask(),
        Mask(causal=True),
        Mask(causal=True, query_offset=0),
        Mask(causal=True, query_offset=torch.tensor([1, 3])),
        Mask(window=(2, 1)),
        Mask(window=(None, 0), key_padding=padding),
        Mask(causal=True, window=(1, None), key_padding=padding),
        Mask(query_segments=segments[:, 2:], key_segments=segments),
    ):
        assert torch.equal(mask.visible(2, 4, 6, torch.device("cpu")), brute(mask, 2, 4, 6))


def test_a_dense_part_may_differ_by_head():
    dense = torch.rand(1, 3, 4, 6) > 0.5
    seen = Mask(dense=dense, causal=True).visible(2, 4, 6, torch.device("cpu"))
    assert seen.shape == (2, 3, 4, 6)
    assert torch.equal(seen, dense & brute(Mask(causal=True), 2, 4, 6))


def test_to_moves_tensors_and_casts_the_bias_alone():
    mask = Mask(causal=True, query_offset=torch.tensor([1]), key_padding=torch.ones(2, 3).bool(), bias=torch.zeros(3))
    moved = mask.to(torch.bfloat16)
    assert (moved.bias.dtype, moved.key_padding.dtype) == (torch.bfloat16, torch.bool)
    assert moved.query_offset.dtype == torch.int64
    assert moved.causal
    assert mask.bias.dtype == torch.float32


def test_what_is_no_flag_is_refused_by_visible_too():
    with pytest.raises(ArgumentError, match=r"mask\.causal is 'no'; it needs True or False"):
        Mask(causal="no").visible(1, 2, 3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_causal": True}, "Mask has no 'is_causal'; use causal=. It has causal, window"),
        ({"padding": None}, "Mask has no 'padding'; use key_padding="),
        ({"causal": True, "shape": 3}, r"Mask has no 'shape'\. It has causal, window"),
    ],
)
def test_names_of_other_libraries(given, message):
    with pytest.raises(ArgumentError, match=message):
        Mask(**given)


def test_copies():
    mask = Mask(causal=True, key_padding=torch.ones(1, 2, dtype=torch.bool))
    for made in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), replace(mask, window=(3, 0))):
        assert made.causal
        assert torch.equal(made.key_padding, mask.key_padding)


def test_help_shows_the_arguments():
    names = [field.name for field in fields(Mask)]
    assert list(inspect.signature(Mask).parameters) == names
