"""The benchmark: every peer is checked, a wrong one is not timed, and peers are timed in turn."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import apt_kernels
from apt_kernels.impl import reference
from apt_kernels.ops.validation import make_inputs
from bench.common import naive
from bench.speed import checking, counts, generation, models, op, peers, registry, timing, training_step
from bench.speed.shapes import REGISTRIES, Shape, causal, decode, encoder, operands
from helpers import accuracy

CPU = torch.device("cpu")
TINY = {shape.name: shape for shapes in REGISTRIES["tiny"].values() for shape in shapes}
WHO = ("no_prefix", "naive", "ours:cpu")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


@pytest.mark.parametrize("name", TINY)
def test_every_shape_times_its_peers_or_says_why_not(name, monkeypatch):
    shape = TINY[name]
    if shape.kind != "decode":  # interpreted kernels are slow, and timed once
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = op.measure(shape, CPU, torch.float32, seconds=0)
    assert set(WHO) <= set(found.samples)
    assert not found.wrong
    assert set(found.samples) | set(found.skipped) == {peer.name for peer in peers.peers()}
    assert all(found.skipped.values())
    for peer, samples in found.samples.items():
        assert set(samples) == set(shape.passes)
        assert all(len(taken) == 5 and min(taken) > 0 for taken in samples.values())
        assert found.figures[peer]["peak_bytes"] > 0
        assert 0 < found.figures[peer]["error"] <= 1
    assert [peer for peer, figures in found.figures.items() if figures["automatic"]] == ["ours:cpu"]
    assert ("float32" in found.samples) == (shape.dtype is not None)


def test_beside_a_case_in_bfloat16_ours_is_timed_in_float32(monkeypatch):
    seen: dict[str, set] = {"naive": set(), "float32": set()}

    def watched(peer):
        def attend(problem):
            call = peer.attend(problem)

            def forward(given):
                seen[peer.name].add(given["query"].dtype)
                return call(given)

            return forward

        return replace(peer, attend=attend)

    chosen = [watched(peer) for peer in peers.peers() if peer.name in seen]
    monkeypatch.setattr(op, "peers", lambda: chosen)
    found = op.measure(REGISTRIES["tiny"]["half"][0], CPU, torch.float32, seconds=0)
    assert set(found.samples) == set(seen)
    assert seen == {"naive": {torch.bfloat16}, "float32": {torch.float32}}


def _wrong_mask(problem):
    return lambda given: naive.attention(**given)


def _wrong_gradient(problem):
    right = peers._naive(problem)
    return lambda given: right({**given, "value": given["value"] * 1.001 - 0.001 * given["value"].detach()})


def _nan(problem):
    right = peers._naive(problem)
    return lambda given: right(given).index_fill(2, torch.tensor([3]), torch.nan)


@pytest.mark.parametrize(("attend", "name"), [(_wrong_mask, "out"), (_wrong_gradient, "value"), (_nan, "out")])
def test_a_wrong_peer_is_not_timed(monkeypatch, attend, name):
    monkeypatch.setattr(op, "peers", lambda: [peers.Peer("wrong", attend)])
    found = op.measure(TINY["causal-b1-h4.2-t32-s32-d16-m4-static"], CPU, torch.float32, seconds=0)
    assert not found.samples
    assert found.wrong["wrong"].startswith(f"{name} is off by")
    assert found.skipped["wrong"].startswith("wrong: ")


@pytest.mark.parametrize("shape", [causal(2, 4, 2, 13, 16, 5, "query", padded=True), encoder(3, 2, 11, 4)], ids=str)
def test_blocks_give_the_rule_of_the_tests(shape, monkeypatch):
    given, grad_out = operands(shape.leaves(CPU, torch.float32, 0)), shape.grad_out(CPU, torch.float32, 0)
    x = checking._detached(make_inputs(**given, mask=shape.mask(CPU)))
    allowed, truth = accuracy.allowed_errors(x, accuracy.differentiable(x), grad_out, None)
    whole = checking.expected(shape, given, grad_out, True, True)
    monkeypatch.setitem(checking._BLOCK, "cpu", 90)
    assert len(list(checking._blocks(x))) > 8
    blocks = checking.expected(shape, given, grad_out, True, True)
    for name in whole.truth:
        torch.testing.assert_close(whole.truth[name], truth[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(blocks.truth[name], truth[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole.allowed[name], allowed[name], rtol=0.5, atol=0)
        torch.testing.assert_close(blocks.allowed[name], allowed[name], rtol=0.5, atol=0)


def test_missing_results_are_wrong():
    shape = TINY["decode-b2-h4.2-t1-s24-d16-m4-query"]
    given, grad_out = operands(shape.leaves(CPU, torch.float32, 0)), shape.grad_out(CPU, torch.float32, 0)
    with pytest.raises(checking.Wrong, match=r"results are \[\]; expected \['out'\]"):
        checking.expected(shape, given, grad_out, True, False).check({})


def test_everyone_runs_in_every_round_in_turn():
    calls = []

    def runner(name):
        return lambda round_: calls.append((round_, name)) or {"step": float(round_)}

    found = timing.in_turn({name: runner(name) for name in "abc"}, CPU, deadline=0, warm_up=2, least=4)
    rounds = [[name for round_, name in calls if round_ == i] for i in range(6)]
    assert rounds[:4] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert all(samples == {"step": [2.0, 3.0, 4.0, 5.0]} for samples in found.values())


def test_inputs_turn_until_the_last_cache_is_past(monkeypatch):
    monkeypatch.setattr(timing, "last_cache", lambda device: 1000)
    assert [timing.input_sets(size, CPU) for size in (1, 400, 5000)] == [8, 6, 1]
    monkeypatch.undo()
    assert timing.last_cache(CPU) >= 1 << 18


@pytest.mark.parametrize("gate", ["none", "row", "query"])
def test_counted_flops_are_those_that_torch_counts(gate):
    shape = encoder(2, 3, 24, 8, gate, padded=False)
    leaves = shape.leaves(CPU, torch.float32, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.attend(make_inputs(**operands(leaves)))
    assert counts.flops(shape, "forward") == counter.get_total_flops()
    assert counts.flops(shape) == 3.5 * counts.attention_flops(shape, 32, "forward") + 3 * counts.gate_flops(
        shape, "forward"
    )
    assert counts.flop_overhead(shape, "forward") == pytest.approx(
        counter.get_total_flops() / (4 * 2 * 3 * 24 * 24 * 64) - 1
    )


def test_visible_columns_are_those_of_the_mask():
    for shape in (causal(3, 2, 2, 9, 16, 4), causal(3, 2, 2, 9, 16, 4, padded=True), encoder(3, 2, 10, 4)):
        seen = shape.mask(CPU).visible(shape.batch, shape.tokens, shape.keys, CPU).expand(shape.batch, -1, -1, -1)
        assert counts.visible(shape) == pytest.approx(float(seen.double().sum(-1).mean()))


def test_counted_bytes_are_those_of_the_tensors():
    shape = causal(2, 4, 2, 16, 32, 8, "query")
    leaves, out = shape.leaves(CPU, torch.float32, 0), shape.grad_out(CPU, torch.float32, 0)
    size = sum(t.nbytes for name, t in leaves.items() if name != "layer_scale") + out.nbytes
    sums = 2 * 4 * 16 * 4
    assert counts.fewest_bytes(shape, torch.float32, "forward") == size + sums
    gradients = sum(t.nbytes for name, t in leaves.items() if name != "layer_scale")
    assert counts.fewest_bytes(shape, torch.float32, "backward") == size + out.nbytes + gradients + sums


def test_case_names_are_unique():
    for name in registry.SECONDS:
        names = [case.name for cases in registry.cases(name).values() for case in cases]
        assert len(set(names)) == len(names)
        assert set(registry.cases(name)) == set(registry.STAGES) == set(registry.SECONDS[name])


@pytest.mark.parametrize(
    ("capability", "gibibytes", "dtype", "cases"),
    [
        ((7, 5), 15, "float16", "small_gpu"),  # a T4
        ((8, 6), 22, "bfloat16", "small_gpu"),  # an A10
        ((8, 0), 40, "bfloat16", "gpu"),
        ((9, 0), 80, "bfloat16", "gpu"),
    ],
)
def test_a_gpu_measures_what_fits_it(capability, gibibytes, dtype, cases, monkeypatch):
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, total_memory=gibibytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda")
    assert (registry.default_dtype(device), registry.default_registry(device)) == (dtype, cases)
    assert (registry.default_dtype(CPU), registry.default_registry(CPU)) == ("float32", "cpu")


@pytest.mark.parametrize("shape", [causal(2, 4, 2, 12, 16, 3), encoder(2, 4, 9, 3), decode(2, 4, 2, 9, 16, 3)])
def test_concatenation_on_a_kernel_without_grouped_heads(shape):
    """On the CPU with PyTorch's plain kernel in place of the memory-efficient one, which is for GPUs."""
    problem = peers.Problem(shape, CPU, torch.float64)
    given = operands(problem.leaves(0))
    found = peers._concat_on(SDPBackend.MATH, problem)(given)
    torch.testing.assert_close(found, peers._naive(problem)(given))
    assert peers._concat_efficient_obstacle(problem) == peers.CUDA_ONLY


def test_the_registry_covers_what_it_must():
    shapes = [shape for shapes in REGISTRIES["gpu"].values() for shape in shapes]

    def values(field: str, kind: str) -> set:
        return {getattr(shape, field) for shape in shapes if shape.kind == kind}

    assert {64, 512} <= values("tokens", "encoder")
    assert values("dim", "encoder") == {64}
    assert {64, 128, 256} <= values("dim", "causal")
    assert {512, 2048, 8192, 16384} <= values("tokens", "causal")
    assert {1024, 32768} <= values("keys", "decode")
    assert {1, 64} <= values("batch", "decode")
    assert {1, 16, 128, 1024, 4096} <= {shape.length for shape in shapes}
    assert {shape.gate for shape in shapes} == {"none", "static", "row", "query"}
    assert {shape.heads == shape.kv_heads for shape in shapes if shape.kind == "causal"} == {True, False}
    sizes = {case.size for case in registry.TRAINING["gpu"]["training"]}
    assert sizes == {"bert-large", "roberta-large", "llama-1b", "llama-8b"}


def test_a_wrong_model_is_not_timed(monkeypatch):
    def wrong(base, shape):
        contender = models._ours(base, shape)
        for prefix in apt_kernels.prefixes(contender.model).values():
            prefix.layer_scale.data.mul_(1.001)
        return contender

    monkeypatch.setitem(models.TRAINING_PEERS, "naive", wrong)
    found = training_step.measure(models.ModelShape("llama-tiny", 2, 12, 4), CPU, torch.float32, 0, ("ours", "naive"))
    assert set(found.samples) == {"ours"}
    assert "is off by" in found.wrong["naive"]


def test_peft_computes_what_we_do_and_drops_its_prefix_under_checkpoints():
    pytest.importorskip("peft", reason="peft is not installed")
    only = ("peft", "cartridge")
    for size in ("bert-tiny", "llama-tiny"):
        shape = models.ModelShape(size, 2, 12, 4, "none")
        assert set(training_step.measure(shape, CPU, torch.float32, 0, only).samples) == {"peft"}
    long = models.ModelShape("llama-tiny", 1, 12, 1024, "none")
    assert set(training_step.measure(long, CPU, torch.float32, 0, only).samples) == {"peft", "cartridge"}
    kept = models.ModelShape("bert-tiny", 2, 12, 4, "none", checkpointing=True)
    found = training_step.measure(kept, CPU, torch.float32, 0, only)
    assert not found.samples
    assert found.skipped["peft"]


def test_generation_checks_and_times_a_token():
    shape = generation.Decoding("llama-tiny", 2, 20, 4, "none")
    found = generation.measure(shape, CPU, torch.float32, 0)
    assert set(found.samples) == {"no_prefix", "ours", "naive", "in_cache"}
    assert all(set(samples) == {"token"} for samples in found.samples.values())
    gated = generation.measure(generation.Decoding("llama-tiny", 2, 20, 4), CPU, torch.float32, 0, ("ours", "in_cache"))
    assert set(gated.samples) == {"ours"}
    assert gated.skipped == {"in_cache": "does not apply: the gate changes with every token"}


def test_shapes_say_what_is_timed():
    assert Shape("decode", 1, 2, 2, 1, 8, 16, 4).passes == ("forward",)
    assert op.passes(Shape("decode", 1, 2, 2, 1, 8, 16, 4), torch.device("cuda")) == ("forward", "graph")
    assert causal(1, 2, 2, 8, 16, 4).passes == ("forward", "backward", "both")


@pytest.mark.parametrize("name", ["cpu/__init__", "cpu/blocks", "cpu/prefix", "cpu/stock", "triton/tiles"])
def test_tuned_numbers_name_their_source(name):
    root = Path(__file__).resolve().parents[2]
    text = (root / f"apt_kernels/impl/{name}.py").read_text(encoding="utf-8")
    found = re.search(r"^Source of its \w+: .*(bench/[\w./]+)\.$", text, re.MULTILINE)
    assert found, f"{name}.py has no line 'Source of its ...: ... bench/...'"
    assert (root / found[1]).exists()


def test_stages_share_what_is_left():
    from bench.speed import run
    from bench.speed.registry import SECONDS

    times, stages = SECONDS["gpu"], ["encoder", "causal", "training"]

    def seconds(*given: str) -> float:
        return run.seconds_of(run.arguments(["--registry", "gpu", "--stage", *given])[0], given[0])

    assert seconds("encoder") == times["encoder"]
    assert seconds("encoder", "--within", "10000", "--then", *stages[1:]) == times["encoder"]
    assert seconds("encoder", "--within", "90", "--seconds", "7") == 7
    shares = [seconds(name, "--within", "90", "--then", *stages) for name in stages]
    assert sum(shares) == pytest.approx(60)
    assert shares[0] / shares[2] == pytest.approx(times["encoder"] / times["training"])
