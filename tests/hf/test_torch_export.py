"""torch.export, AOTInductor, torch.jit.trace, ONNX, ExecuTorch: the model's outputs, also at other sizes."""

import itertools
import shutil

import pytest
import torch

import apt_kernels
from helpers import exported_caches, models, onnx_models
from helpers.patched import randomise

M = 5
CASES = [("llama", "token"), ("qwen3", "static"), ("bert", "first"), ("bert", "mean"), ("t5", "auto"), ("gpt2", "none")]


def patched(family, gate):
    model = models.build(family)
    apt_kernels.patch(model, prefix_length=M, gate=gate)
    randomise(model)
    return model


def arguments(family, padding=None, **sizes):
    given = models.inputs(family, padding, **sizes)
    return given if family == "bert" else {**given, "use_cache": False}


def dynamic(given):
    """Dynamic batch and lengths; a decoder has a separate length."""
    batch = torch.export.Dim("batch", min=2, max=64)
    length, own = torch.export.Dim("length", min=2, max=40), torch.export.Dim("decoder_length", min=2, max=40)
    shapes = {name: {0: batch, 1: own if name.startswith("decoder") else length} for name in given}
    return {**shapes, "use_cache": None} if "use_cache" in given else shapes


@torch.no_grad()
def check(run, model, family):
    """``run(**given)`` gives the model's logits at other sizes than the export, where the prefix has an influence."""
    for sizes in ({"batch": 2, "length": 20}, {"batch": 5, "length": 7}):
        given = arguments(family, "right", **sizes)
        expected, found = model(**given).logits, run(**given)
        real = given["attention_mask"].bool() if family != "t5" else torch.ones(expected.shape[:2], dtype=torch.bool)
        with apt_kernels.disabled(model):
            assert (model(**given).logits - expected)[real].abs().max() > 1e-2
        # The orders of summation differ, in float32; logits reach some tens.
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def export(model, given, strict=False):
    return torch.export.export(model, (), given, dynamic_shapes=dynamic(given), strict=strict)


@pytest.mark.parametrize(
    ("family", "gate", "strict"),
    [*((*case, False) for case in CASES), ("llama", "token", True), ("bert", "first", True)],
)
def test_torch_export(family, gate, strict):
    model = patched(family, gate)
    program = export(model, arguments(family), strict)
    assert not [node for node in program.graph.nodes if "apt_kernels" in str(node.target)]
    exported = program.module()
    check(lambda **given: exported(**given).logits, model, family)


@torch.no_grad()
def continued(model, batch, past, length, start=None):
    """Arguments that continue a cache of ``past`` tokens; the first row has two tokens of padding in front.

    ``start``: what computes the cache (None: the model).
    """
    ids = models.inputs("llama", batch=batch, length=past + length)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    # torch.export adds guards to the example's views.
    first, rest = ids[:, :past].clone(), ids[:, past:].clone()
    cache = (start or model)(input_ids=first, attention_mask=mask[:, :past].clone(), use_cache=True).past_key_values
    return {"input_ids": rest, "attention_mask": mask, "past_key_values": cache, "use_cache": True}


def every_size(given):
    """Every batch size and length of the arguments, and of the cache in them."""
    sizes = torch.export.ShapesCollection()
    for tensor in torch.utils._pytree.tree_leaves(given):
        if isinstance(tensor, torch.Tensor):
            # [B, T]; keys and values [B, H, S, D]; the gates [B, M] and [B] of a cache.
            dims = {2: (0, 1), 4: (0, 2)}.get(tensor.ndim, (0,)) if tensor.shape[-1] != M else (0,)
            sizes[tensor] = dict.fromkeys(dims, torch.export.Dim.AUTO)
    return sizes


def exported(model, given):
    return torch.export.export(model, (), given, dynamic_shapes=every_size(given), strict=False).module()


@pytest.fixture
def caches_as_inputs():
    """The registration of caches with torch, for one test: it changes what torch does with caches."""
    apt_kernels.register_cache_for_export()
    apt_kernels.register_cache_for_export()
    yield
    exported_caches.forget()


@pytest.mark.usefixtures("caches_as_inputs")
@pytest.mark.parametrize(
    ("family", "gate"), [("llama", "token"), ("qwen3", "static"), ("gpt2", "none"), ("gpt2", "first")]
)
def test_a_program_continues_a_cache(family, gate):
    """The model's cache, and that of a program; then the program's own, one token at a time."""
    model = patched(family, gate)
    step, starts = exported(model, continued(model, 2, 9, 3)), [None]
    if gate == "first":
        prompt = continued(model, 2, 9, 3)
        del prompt["past_key_values"]
        starts.append(exported(model, {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}))
    for start, each in itertools.product(starts, ((2, 9, 3), (3, 5, 4), (2, 12, 1))):
        ours, theirs = continued(model, *each, start), continued(model, *each)
        for _ in range(2):
            with torch.no_grad():
                expected, found = model(**theirs), step(**ours)
            # The orders of summation differ, in float32; logits reach some tens.
            torch.testing.assert_close(found.logits[1:], expected.logits[1:], rtol=1e-4, atol=1e-4)
            layers = zip(found.past_key_values.layers, expected.past_key_values.layers)
            assert all(ours.keys.shape == theirs.keys.shape for ours, theirs in layers)
            ids, mask = ours["input_ids"][:, :1], torch.nn.functional.pad(ours["attention_mask"], (0, 1), value=1)
            ours, theirs = (
                {**given, "input_ids": ids, "attention_mask": mask, "past_key_values": results.past_key_values}
                for given, results in ((ours, found), (theirs, expected))
            )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler, g++")
def test_aot_inductor(tmp_path):
    model = patched("bert", "mean")
    path = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(export(model, arguments("bert")), package_path=str(path))
    loaded = torch._inductor.aoti_load_package(str(path))
    check(lambda **given: loaded(**given).logits, model, "bert")


class Logits(torch.nn.Module):
    """Takes positional arguments and returns one tensor, as torch.jit.trace requires."""

    def __init__(self, model, family):
        super().__init__()
        self.model, self.options = model, {} if family == "bert" else {"use_cache": False}

    def forward(self, input_ids, attention_mask, decoder_input_ids=None):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **self.options}
        if decoder_input_ids is not None:
            given["decoder_input_ids"] = decoder_input_ids
        return self.model(**given).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("family", "gate"), [*CASES, ("llama", "static"), ("llama", "first")])
def test_torch_jit_trace(family, gate, tmp_path):
    """Traced without padding, saved, loaded, and run with padding at other sizes."""
    model = patched(family, gate)
    traced = torch.jit.trace(Logits(model, family), tuple(models.inputs(family).values()), check_trace=False)
    torch.jit.save(traced, tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    check(lambda use_cache=None, **given: loaded(*given.values()), model, family)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "gate", "whole"),
    [
        ("llama", "token", True),
        ("bert", "first", True),
        ("t5", "auto", True),
        ("gpt2", "none", False),
    ],
)
def test_onnx(family, gate, whole, tmp_path):
    """In standard operators, and with ``whole`` each attention as one node of the function."""
    onnx_models.require()
    model, given, functions = patched(family, gate), arguments(family), apt_kernels.OnnxFunctions()
    path, table = tmp_path / "model.onnx", functions if whole else None
    program = torch.onnx.export(
        model, (), kwargs=given, dynamic_shapes=dynamic(given), dynamo=True, custom_translation_table=table
    )
    if whole:
        functions.define(program)
    else:
        with pytest.raises(apt_kernels.ArgumentError, match="has no attention of this table"):
            functions.define(program)
    named = [node.op_identifier()[:2] for node in program.model.graph if node.domain]
    assert named == [("apt_kernels", "attention")] * len(apt_kernels.prefixes(model)) * whole
    assert {function.name for function in program.model.functions.values()} == ({"attention"} if whole else set())
    program.save(path)
    check(onnx_models.runner(path), model, family)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "gate"), [("bert", "first"), ("llama", "token")])
def test_executorch(family, gate):
    # pyproject.toml does not ask for it: each case takes a minute, and the model is exported in other tests too.
    pytest.importorskip("executorch.exir", reason="executorch is not installed; pip install executorch")
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model, given = patched(family, gate), arguments(family)
    program = to_edge_transform_and_lower(export(model, given)).to_executorch()
    method = Runtime.get().load_program(program.buffer).load_method("forward")
    check(lambda **given: method.execute([*given.values()])[0], model, family)
