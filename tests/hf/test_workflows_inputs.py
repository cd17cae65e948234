"""What people do, one test for each thing that once went wrong: inputs of the op, files from strangers, edge cases.

The inputs are the users' own. test_workflows.py has the other kinds.
"""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
import transformers
from torch.func import functional_call, grad, jvp, vmap

import apt_kernels
from apt_kernels import ArgumentError, Mask
from helpers.accuracy import poisoned_memory
from helpers.patched import assert_unchanged, snapshot
from helpers.processor_time import at_most
from helpers.workflows import bert, llama, stir, token_ids

IDS = token_ids()


# 6. Input of the op.


def operands(queries=3, heads=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (1, heads, queries, 16), "key": (1, 2, 5, 16), "value": (1, 2, 5, 16)}
    shapes |= {"prefix_key": (2, 3, 16), "prefix_value": (2, 3, 16)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_single_query_of_grouped_heads_with_a_strided_last_dimension(implementation):
    given = operands(queries=1, dtype=torch.float32)
    buffer = torch.full((1, 4, 1, 32), 777.0)
    buffer[..., ::2] = given["query"]
    expected = apt_kernels.attention(**given, implementation="reference")
    with poisoned_memory():
        found = apt_kernels.attention(**{**given, "query": buffer[..., ::2]}, implementation=implementation)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_of_zero_or_below_with_a_causal_mask(scale):
    given = {**operands(queries=5), "scale": scale, "mask": Mask(causal=True)}
    found = apt_kernels.attention(**given, implementation="cpu")
    torch.testing.assert_close(found, apt_kernels.attention(**given, implementation="reference"))


def test_jvp_of_the_op():
    given = operands()

    def call(query):
        return apt_kernels.attention(**{**given, "query": query})

    tangent, step = torch.ones_like(given["query"]), 1e-6
    _, slope = jvp(call, (given["query"],), (tangent,))
    numeric = (call(given["query"] + step * tangent) - call(given["query"] - step * tangent)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)  # the error of central differences


def test_gradients_per_sample():
    given = operands()
    prefix, query = given.pop("prefix_key"), given.pop("query")
    queries = torch.stack([query, 2 * query, 3 * query])

    def loss(prefix_key, query):
        return apt_kernels.attention(**given, query=query, prefix_key=prefix_key).sin().sum()

    found = vmap(grad(loss), (None, 0))(prefix, queries)
    torch.testing.assert_close(found, torch.stack([grad(loss)(prefix, query) for query in queries]))


def test_gradients_per_sample_of_a_model():
    model = stir(apt_kernels.patch(llama(), prefix_length=4)).double()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights, row):
        out = functional_call(model, weights, kwargs={"input_ids": row[None], "use_cache": False})
        return out.logits.sin().mean()

    found = vmap(grad(loss), (None, 0))(trained, IDS)
    for number, row in enumerate(IDS):
        for name, expected in grad(loss)(trained, row).items():
            torch.testing.assert_close(found[name][number], expected, msg=lambda text, name=name: f"{name}: {text}")


def gptj():
    torch.manual_seed(0)
    config = transformers.GPTJConfig(vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    return transformers.GPTJForCausalLM(config).eval()


@torch.no_grad()
def test_gptj_patched_then_cast():
    first = stir(apt_kernels.patch(gptj().to(torch.bfloat16), prefix_length=4))
    after = stir(apt_kernels.patch(gptj(), prefix_length=4)).to(torch.bfloat16)
    expected = first(input_ids=IDS).logits
    assert expected.dtype == torch.bfloat16
    # The prefix was rounded to bfloat16 by the cast, once.
    torch.testing.assert_close(after(input_ids=IDS).logits, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", ["value", "prefix_value"])
def test_reference_where_only_values_need_a_gradient_and_the_logsumexp_has_one(name):
    given = operands()
    given[name].requires_grad_()
    out, logsumexp = apt_kernels.attention(**given, return_logsumexp=True, implementation="reference")
    (found,) = torch.autograd.grad(out.sum() + logsumexp.sum(), given[name])
    (expected,) = torch.autograd.grad(apt_kernels.attention(**given, implementation="reference").sum(), given[name])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [{"attn_mask": torch.ones(3, 5, dtype=torch.bool)}, {"is_causal": True}])
def test_the_keywords_of_scaled_dot_product_attention(wrong):
    with pytest.raises(ArgumentError, match=rf"no argument '{next(iter(wrong))}'; use mask=Mask\("):
        apt_kernels.attention(**operands(), **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"query_offset": 1.5}, "query_offset is (a float|1.5)"), ({"causal": "no"}, "causal is 'no'; it needs True or")],
)
def test_masks_of_a_wrong_type(wrong, message):
    with pytest.raises(ArgumentError, match=message):
        apt_kernels.attention(**operands(), mask=Mask(**wrong))


# 7. Files from strangers.

EVIL = r"((\w+\.?)+)+!"


def adapter(folder, **changes):
    """A good adapter whose settings were then changed, with the checksum that belongs to them."""
    from safetensors.torch import load_file

    from apt_kernels.hf.adapter_file import write_adapter

    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=4)), folder)
    settings = {**json.loads((folder / "apt_config.json").read_text()), **changes}
    write_adapter(folder, load_file(folder / "adapter.safetensors"), settings)
    return folder


def refused(folder, message=None):
    model = llama()
    before = snapshot(model)
    with at_most(5), pytest.raises(apt_kernels.AdapterError, match=message) as error:
        apt_kernels.load(model, folder)
    assert_unchanged(model, before)
    return str(error.value)


@pytest.mark.parametrize("name", ["layers", "trainable"])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_pattern_that_takes_for_ever(name, as_list, tmp_path):
    assert "adapter.safetensors" in refused(adapter(tmp_path, **{name: [EVIL] if as_list else EVIL}))


MANY = {
    "trainable": ["(a|b)*c"] * 5000,
    "layers": [*[0, 1, 2] * 50_000, "nowhere"],
}


@pytest.mark.parametrize("name", MANY)
def test_a_setting_that_repeats_itself(name, tmp_path):
    refused(adapter(tmp_path, **{name: MANY[name]}), f"{name} has .*; (no parameter's name|the model has no such)")


@pytest.mark.parametrize("name", MANY)
def test_a_setting_of_very_many_patterns(name, tmp_path):
    patterns = [f"^model.layers.{number}.x$" for number in range(40_000)]
    refused(adapter(tmp_path, **{name: patterns}), f"{name} has 40000 patterns; a file has 5000 at most")


def test_a_prefix_length_out_of_proportion_to_the_weights(tmp_path):
    refused(adapter(tmp_path, prefix_length=10**7), "prefix_length gives .* 10000000 tokens; its weights there have 4")


MALFORMED = (None, -1, 1.5, "four", [], {}, [4, "x", 4], [[4]], 10**17, True, float(2**60))
READ = (
    "prefix_length",
    "gate",
    "layer_scale",
    "init",
    "init_std",
    "init_seed",
    "layers",
    "trainable",
    "prefix_dropout",
)


@pytest.mark.parametrize("name", [*READ, "prefix_dropout", "reparameterisation", "base", "lengths"])
def test_malformed_values_are_adapter_errors_or_load(name, tmp_path):
    model = llama()
    before, messages = snapshot(model), []
    for value in MALFORMED:
        try:
            apt_kernels.load(model, adapter(tmp_path, **{name: value}))
        except apt_kernels.AdapterError as error:
            messages.append(str(error))
        else:
            apt_kernels.unpatch(model)
        assert_unchanged(model, before)
    assert all(str(tmp_path) in message for message in messages)
    assert messages or name == "lengths", "nothing was refused"


def test_a_missing_relative_folder_is_said_to_be_neither_here_nor_on_the_hub(monkeypatch):
    import huggingface_hub

    def missing(repo_id, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    message = refused("runs/adapter")
    assert "'runs/adapter' is not a folder on this machine, and could not be read from the Hugging Face hub" in message


# 8. At the edges.


@torch.no_grad()
def test_an_attention_function_of_the_users_own_is_called_where_there_is_no_prefix():
    called = []

    def mine(module, query, key, value, attention_mask, **kwargs):
        called.append(module.layer_idx)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )

    transformers.AttentionInterface.register("mine", mine)
    model = llama()
    model.set_attn_implementation("mine")
    model(input_ids=IDS)
    expected, called[:] = list(called), []
    assert expected == [0, 1, 2]
    apt_kernels.patch(model, prefix_length=4, layers=[2])
    called.clear()
    model(input_ids=IDS)
    assert called == [0, 1]
    apt_kernels.unpatch(model)
    called.clear()
    model(input_ids=IDS)
    assert called == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_new_head_on_a_half_precision_base(dtype):
    model = apt_kernels.patch(bert().to(dtype), prefix_length=4).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    before = model.classifier.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-5)
    scaler.scale(model(input_ids=IDS, labels=torch.tensor([0, 2])).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (model.classifier.weight != before).float().mean() > 0.99


def test_output_attentions_of_an_eager_model_warns():
    model = llama()
    model.set_attn_implementation("eager")
    apt_kernels.patch(model, prefix_length=4)
    with pytest.warns(UserWarning, match="attention weights"):
        model(input_ids=IDS, output_attentions=True)


def test_default_dtype_and_device():
    expected = apt_kernels.patch(llama(), prefix_length=4, init_seed=0)
    base = llama()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = apt_kernels.patch(copy.deepcopy(base), prefix_length=4, init_seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        other = apt_kernels.patch(base, prefix_length=4, init_seed=0)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
        assert torch.equal(other.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 99999], "input_ids has 99999; the model has tokens from 0 to 96"),
        ("some text", r"input_ids is a str; it needs the token ids of one text.*tokenizer\(text\)\.input_ids"),
        (transformers.BatchEncoding({"input_ids": [1, 2]}), r"input_ids is a BatchEncoding; .*\['input_ids'\]"),
        (IDS, r"input_ids has the shape \[2, 9\]; it needs the token ids of one text"),
    ],
)
def test_what_patch_from_text_cannot_read(given, message):
    with pytest.raises(ArgumentError, match=message):
        apt_kernels.patch_from_text(llama(), given)


@pytest.mark.parametrize(("model", "what"), [("llama", "a str"), (None, "None"), (torch.nn.Linear(2, 2), "a Linear")])
def test_what_is_no_model_of_transformers(model, what):
    for call in (apt_kernels.patch, lambda model: apt_kernels.patch_from_text(model, [3, 4])):
        with pytest.raises(apt_kernels.PatchError, match=f"the model is {what}; patch needs"):
            call(model)


def test_what_holds_a_model_of_transformers():
    class Pipeline:
        model = llama()

    nested = torch.nn.Sequential(torch.nn.Sequential(llama()))
    for given, where in ((nested, "model.get_submodule('0.0')"), (Pipeline(), "model.model")):
        with pytest.raises(apt_kernels.PatchError, match=re.escape(f"PreTrainedModel; it holds one: {where}")):
            apt_kernels.patch(given)


def test_a_peft_model_in_the_place_of_its_folder():
    model = peft.get_peft_model(llama(), peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ArgumentError, match=r"folder is a PeftModelForCausalLM; .*save_pretrained\(folder\) first"):
        apt_kernels.patch_from_peft(llama(), model)


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_a_prefix_on_the_outer_of_a_patched_base_or_the_reverse(first):
    model = bert()
    one, other = (model.bert, model) if first == "inner" else (model, model.bert)
    stir(apt_kernels.patch(one, prefix_length=4))
    expected = model(input_ids=IDS).logits
    with pytest.raises(apt_kernels.PatchError, match=re.escape("patched; call apt_kernels.unpatch on")):
        apt_kernels.patch(other, prefix_length=4)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_deep_copy_made_inside_disabled():
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    expected = model(input_ids=IDS).logits
    with apt_kernels.disabled(model):
        copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=IDS).logits, expected)
