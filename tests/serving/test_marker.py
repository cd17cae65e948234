"""The marker with a stand-in kernel that takes no prefix: exact attention over prefix and keys. Runs without vLLM."""

import math

import pytest
import torch

import apt_kernels
from apt_kernels.ops.validation import make_inputs
from apt_kernels.prefix.gate_product import gate_product
from apt_kernels.serving.vllm import marker
from apt_kernels.serving.vllm.prefix import ServedPrefix
from helpers import accuracy

TOKENS, KEYS, HEADS, KEY_HEADS, HEAD_DIM, WIDTH, SIZE, BLOCK = 5, 9, 4, 2, 32, 24, 40, 16
GATES = ("none", "static", "token")


def kernel(query, key, value, scale):
    """What vLLM's kernels compute: causal softmax attention ``[N, H, D]`` in the inputs' dtype, the sum in float32."""
    q, k, v = (part.float().transpose(0, 1) for part in (query, key, value))
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    logits = (q @ k.mT * scale).masked_fill(hidden, -math.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def case(gate, length, dtype=torch.float32, layer_scale=True, size=1.0):
    """Queries and hidden states of the last `TOKENS` of `KEYS` tokens, keys and values of all; an adapter's tensors."""
    draw = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    states = [
        normal(TOKENS, HEADS, HEAD_DIM),
        normal(KEYS, KEY_HEADS, HEAD_DIM),
        normal(KEYS, KEY_HEADS, HEAD_DIM),
        normal(TOKENS, WIDTH),
    ]
    tensors = {"key": size * normal(KEY_HEADS, length, HEAD_DIM), "value": normal(KEY_HEADS, length, HEAD_DIM)}
    if gate == "token":
        tensors["gate_weight"] = normal(length, WIDTH)
    if gate == "static":
        tensors["gate_logits"] = normal(length)
    if layer_scale:
        tensors["layer_scale"] = torch.tensor([1.3])
    return [part.to(dtype) for part in states], tensors


def served(states, tensors, gate, scale):
    query, key, value, hidden = states
    prefix = ServedPrefix(gate, tensors, slice(0, KEY_HEADS), scale)
    own, logsumexp = prefix(query, prefix.logits(hidden))
    block = marker.block(BLOCK, KEY_HEADS, HEAD_DIM, SIZE, key)
    out = kernel(
        marker.pad_query(query, logsumexp, scale, SIZE),
        torch.cat([block[0], marker.pad_zeros(key, SIZE)]),
        torch.cat([block[1], marker.pad_zeros(value, SIZE)]),
        scale,
    )
    return marker.merge(out, own)


def check(states, tensors, gate, scale):
    """Compare the output with the specification by the error rule of the op."""
    out = served(states, tensors, gate, scale)
    query, key, value = (part.transpose(0, 1)[None] for part in states[:3])
    logits = gate_product(states[3], tensors["gate_weight"])[None] if gate == "token" else tensors.get("gate_logits")
    x = make_inputs(
        query,
        key,
        value,
        tensors["key"],
        tensors["value"],
        logits,
        tensors.get("layer_scale"),
        mask=apt_kernels.Mask(causal=True),
        scale=scale,
    )
    allowed, truth = accuracy.allowed_errors(x, (), torch.zeros_like(query), None)
    error = (out.transpose(0, 1)[None].double() - truth["out"]).abs()
    assert (error <= allowed["out"]).all(), f"{(error / allowed['out']).max():.3g} of what is allowed"
    return out


@pytest.mark.parametrize("length", [1, 10, 45])
@pytest.mark.parametrize("gate", GATES)
def test_the_marker_gives_attention_over_prefix_and_keys(gate, length):
    states, tensors = case(gate, length)
    out = check(states, tensors, gate, HEAD_DIM**-0.5)
    alone = kernel(*states[:3], HEAD_DIM**-0.5)
    assert (alone - out).abs().max() > 1e-2, "the prefix has no influence"


def test_without_a_layer_scale():
    states, tensors = case("token", 7, layer_scale=False)
    assert "layer_scale" not in tensors
    check(states, tensors, "token", 0.2)


@pytest.mark.parametrize("size", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision(dtype, size):
    states, tensors = case("token", 12, dtype, size=size)
    check(states, tensors, "token", 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_pieces_hold_the_log_sum_exp_to_float32(dtype, pieces, monkeypatch):
    monkeypatch.setattr(marker, "_PIECES", pieces)
    monkeypatch.setattr(marker, "SPARE", pieces + 1)
    logsumexp, scale = torch.linspace(-300, 300, 999).reshape(333, 3), 0.125
    query = torch.zeros(333, 3, HEAD_DIM, dtype=dtype)
    padded = marker.pad_query(query, logsumexp, scale, SIZE)
    held = padded[..., HEAD_DIM : HEAD_DIM + pieces].double().sum(-1) * scale
    exact = bool(((held - logsumexp.double()).abs() <= 2**-23 * logsumexp.double().abs()).all())
    assert exact is (pieces == 3 or dtype == torch.float32)


def test_no_query_sees_the_rest_of_the_markers_block(monkeypatch):
    states, tensors = case("none", 3)
    expected = served(states, tensors, "none", 0.2)
    monkeypatch.setattr("test_marker.BLOCK", 64)
    torch.testing.assert_close(served(states, tensors, "none", 0.2), expected)
    monkeypatch.setattr(marker, "_HIDDEN", 0.0)
    assert (served(states, tensors, "none", 0.2) - expected).abs().max() > 1e-2


def test_each_process_has_its_own_heads():
    (query, _, _, hidden), tensors = case("token", 6)
    whole = ServedPrefix("token", tensors, slice(0, KEY_HEADS), 0.2)
    expected, group = whole(query, whole.logits(hidden)), HEADS // KEY_HEADS
    for head in range(KEY_HEADS):
        mine = slice(head * group, (head + 1) * group)
        part = ServedPrefix("token", tensors, slice(head, head + 1), 0.2)
        for ours, theirs in zip(part(query[:, mine], part.logits(hidden)), expected):
            torch.testing.assert_close(ours, theirs[:, mine])
