"""``adapter_names``: each row of a mixed batch equals the same row alone under its adapter."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch

import apt_kernels
from apt_kernels.errors import ConfigError, PatchError
from apt_kernels.hf import calls
from apt_kernels.hf.attention import rows as rows_module
from helpers import models
from helpers.patched import randomise

FAMILIES = models.some(models.FAMILIES)
GENERATING = tuple(family for family in FAMILIES if family not in models.ENCODERS)
BASE = "__base__"
NAMES = ["a", "b", BASE, "c", "b"]
CACHES = [{}, {"cache_implementation": "static"}, {"use_cache": False}]


def several(family: str, gates: tuple[str, ...] = ("auto", "static", "none"), **options):
    """A model with the adapters a, b and c of different lengths, gates, scales and layers; a is active."""
    model = models.build(family, **options).to(models.widest(family))
    patched = apt_kernels.patch(copy.deepcopy(model), prefix_length=5, gate=gates[0])
    randomise(patched, 1)
    apt_kernels.add_adapter(patched, "a", prefix_length=5, gate=gates[0])
    apt_kernels.delete_adapter(patched, "default")
    randomise(patched, 1)
    last = -1 if family == "t5" else 1
    apt_kernels.add_adapter(patched, "b", prefix_length=3, gate=gates[1], layers=[last])
    randomise(patched, 2)
    apt_kernels.add_adapter(patched, "c", prefix_length=7, gate=gates[2], layer_scale=False)
    randomise(patched, 3)
    apt_kernels.set_adapter(patched, "a")
    return model, patched.to(models.widest(family))


def alone(plain, patched, name: str):
    """A model whose rows all use an adapter."""
    made = copy.deepcopy(plain if name == BASE else patched)
    return made if name == BASE else apt_kernels.set_adapter(made, name).to(plain.dtype)


def row(given: dict, i: int) -> dict:
    return {name: tensor[i : i + 1] for name, tensor in given.items()}


def real(given: dict, logits: torch.Tensor) -> torch.Tensor:
    mask = given["attention_mask"].bool()
    return mask if mask.shape == logits.shape[:2] else torch.ones(logits.shape[:2], dtype=torch.bool)


@pytest.mark.proves("a batch with an adapter for each row (adapter_names), or none")
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family, padding):
    plain, patched = several(family)
    given = models.inputs(family, padding, batch=len(NAMES))
    given["inputs_embeds"] = patched.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
    logits = patched(**given, adapter_names=NAMES).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    weight = weight * real(given, logits)[..., None]
    (logits * weight).sum().backward()
    for i, name in enumerate(NAMES):
        single = alone(plain, patched, name)
        one = row({key: part.detach() for key, part in given.items()}, i)
        one["inputs_embeds"].requires_grad_()
        expected = single(**one).logits
        at = real(one, expected)
        torch.testing.assert_close(logits[i : i + 1][at], expected[at], **models.rounding(family))
        single.zero_grad()
        (expected * weight[i : i + 1]).sum().backward()
        torch.testing.assert_close(
            given["inputs_embeds"].grad[i], one["inputs_embeds"].grad[0], **models.rounding(family)
        )
        if name == "a":
            own = dict(single.named_parameters())
            for key, parameter in patched.named_parameters():
                if parameter.requires_grad:
                    torch.testing.assert_close(parameter.grad, own[key].grad, **models.rounding(family))
    for parked in patched._apt_state.parked.values():
        assert all(p.grad is None for prefix in parked.prefixes.values() for p in prefix.parameters())


@pytest.mark.proves("generation with an adapter for each row, two kinds of caches and none")
@pytest.mark.parametrize(
    "gates", [("first", "token", "static"), ("none", "first", "token"), ("first", "first", "first")]
)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("family", GENERATING)
def test_generation(family, cache, gates):
    plain, patched = several(family, gates)
    given = models.inputs(family, None if family == "t5" else "left", batch=len(NAMES))
    given.pop("decoder_input_ids", None)
    options = dict(
        max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    found = patched.generate(**given, **options, **cache, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        expected = alone(plain, patched, name).generate(**row(given, i), **options)  # with a dynamic cache
        assert torch.equal(found.sequences[i], expected.sequences[0]), name
        logits = [torch.stack(each.logits) for each in (found, expected)]
        # generate keeps logits in float32.
        close = {each: max(bound, 1e-6) for each, bound in models.rounding(family).items()}
        torch.testing.assert_close(logits[0][:, i], logits[1][:, 0], **close)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_the_names_follow_beams(family):
    plain, patched = several(family, ("first", "token", "static"))
    given = models.inputs(family, None if family == "t5" else "left", batch=len(NAMES))
    given.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=2)
    found = patched.generate(**given, **options, adapter_names=NAMES).view(len(NAMES), 2, -1)
    for i, name in enumerate(NAMES):
        assert torch.equal(found[i], alone(plain, patched, name).generate(**row(given, i), **options)), name


@pytest.mark.parametrize("assistant", ["the base model", "the model itself", "the prompt"])
@pytest.mark.parametrize("name", ["a", "b", "c", BASE])
def test_assisted_decoding(name, assistant):
    plain, patched = several("llama", ("first", "token", "static"))
    given = models.inputs("llama", None, batch=1)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    how = {
        "the base model": {"assistant_model": copy.deepcopy(plain)},
        "the model itself": {"assistant_model": patched},
        "the prompt": {"prompt_lookup_num_tokens": 2},
    }
    found = patched.generate(**given, **options, **how[assistant], adapter_names=[name])
    assert torch.equal(found, alone(plain, patched, name).generate(**given, **options))


def test_sampling_uses_the_row_s_distribution():
    plain, patched = several("llama", ("first", "token", "static"))
    given = models.inputs("llama", "left", batch=3)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    names = ["b", BASE, "a"]
    out = patched.generate(**given, **options, adapter_names=names, output_logits=True, return_dict_in_generate=True)
    for i, name in enumerate(names):
        single = alone(plain, patched, name)
        for k in range(2):
            sequence = out.sequences[2 * i + k][None]
            mask = torch.cat([given["attention_mask"][i : i + 1], torch.ones(1, 4, dtype=torch.long)], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = single(input_ids=sequence, attention_mask=mask, position_ids=positions).logits[0, -5:-1]
            # generate keeps logits in float32.
            torch.testing.assert_close(torch.stack(out.logits)[:, 2 * i + k], logits.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_rows_alone_are_bit_for_bit_the_unpatched_model(family):
    plain, patched = several(family)
    given = models.inputs(family, "right")
    with torch.no_grad():
        assert torch.equal(patched(**given, adapter_names=[BASE] * 3).logits, plain(**given).logits)
        assert torch.equal(patched(**given, adapter_names=["a"] * 3).logits, patched(**given).logits)
    assert calls.local.rows is None


def test_the_body_alone_takes_names():
    _, patched = several("llama")
    given = models.inputs("llama", batch=5)
    whole = patched(**given, adapter_names=NAMES, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(patched.model(**given, adapter_names=NAMES).last_hidden_state, whole)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_attention_that_a_model_computes_inline(family):
    import transformers

    made = {
        "bloom": lambda: transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
        "gptj": lambda: transformers.GPTJConfig(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=40
        ),
    }[family]()
    made.initializer_range = 0.2
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(made).eval()
    patched = apt_kernels.patch(copy.deepcopy(plain), prefix_length=4, gate="token")
    randomise(patched, 1)
    apt_kernels.add_adapter(patched, "b", prefix_length=2, gate="static", layers=[1])
    randomise(patched, 2)
    given, names = models.inputs("llama"), ["default", BASE, "b"]
    apt_kernels.set_adapter(patched, "default")
    logits = patched(**given, adapter_names=names).logits
    for i, name in enumerate(names):
        expected = alone(plain.float(), patched.float(), name).float()(**row(given, i)).logits[0]
        torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_recomputes_with_the_same_names():
    grads = []
    for checkpointing in (False, True):
        _, patched = several("llama")
        patched.train()
        if checkpointing:
            patched.gradient_checkpointing_enable()
        patched(
            **models.inputs("llama", batch=5), adapter_names=NAMES, use_cache=False
        ).logits.square().sum().backward()
        grads.append([p.grad for p in patched.parameters() if p.requires_grad])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_threads_with_different_mixtures_are_independent():
    _, patched = several("llama")
    given = models.inputs("llama", batch=3)
    mixtures = [["a", "b", "c"], ["c", BASE, "a"], None, ["b", "b", "b"]]
    with torch.no_grad():
        expected = [patched(**given, adapter_names=names).logits for names in mixtures]
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(patched(**given, adapter_names=mixtures[i]).logits, expected[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(mixtures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("gate", ["first", "token"])
def test_packed_documents_of_inline_attention_are_refused_with_a_gate_for_each_sequence(gate):
    import transformers

    config = transformers.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=40)
    model = apt_kernels.patch(transformers.GPTJForCausalLM(config).eval(), prefix_length=3, gate="token")
    apt_kernels.add_adapter(model, "b", prefix_length=3, gate=gate)
    apt_kernels.set_adapter(model, "default")
    given = {"input_ids": torch.randint(3, 99, (2, 6)), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}
    model(**given, use_cache=False)
    call = functools.partial(model, **given, use_cache=False, adapter_names=["default", "b"])
    if gate == "token":
        call()
    else:
        with pytest.raises(PatchError, match="position_ids begin again within a row"):
            call()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b"], ConfigError, "adapter_names has 2 names; the batch has 3 rows"),
        (["a", "b", "d"], ConfigError, "adapter_names has 'd'; the model has 'a', 'c', 'b', '__base__'|has 'd'"),
        ("abc", ConfigError, "adapter_names is 'abc'; it needs a list"),
        ([], ConfigError, r"adapter_names is \[\]"),
    ],
)
def test_wrong_names_raise_and_leave_no_state(names, error, message):
    _, patched = several("llama")
    given = models.inputs("llama")
    before = patched(**given).logits
    for call in (patched, patched.model, lambda **k: patched.generate(**k, max_new_tokens=2)):
        with pytest.raises(error, match=message):
            call(**given, adapter_names=names)
    assert calls.local.rows is None
    assert torch.equal(patched(**given).logits, before)


def test_names_that_would_be_ignored_raise():
    _, patched = several("llama")
    given = models.inputs("llama")
    with apt_kernels.disabled(patched), pytest.raises(PatchError, match="disabled, which would ignore it"):
        patched(**given, adapter_names=["a", "b", "c"])


def test_names_for_the_adapters_of_peft_are_refused():
    from peft import LoraConfig, get_peft_model

    both = get_peft_model(several("llama")[1], LoraConfig(r=2, target_modules=["q_proj"])).eval()
    given = models.inputs("llama")
    both(**given)
    for call in (both, lambda **k: both.generate(**k, max_new_tokens=2)):
        with pytest.raises(PatchError, match="adapter_names is given to PEFT's model"):
            call(**given, adapter_names=["default", BASE, "default"])


def test_a_compiled_model_runs_calls_with_names_outside_of_graphs():
    _, patched = several("llama")
    given, mixtures = models.inputs("llama"), [None, ["a", "b", BASE], None, ["c", "c", "b"]]
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="eager")
    with torch.no_grad():
        for names in mixtures:
            assert torch.equal(
                compiled(**given, adapter_names=names).logits, patched(**given, adapter_names=names).logits
            )


def test_task_heads_that_differ_are_refused_by_name():
    model = models.build("bert", "AutoModelForSequenceClassification")
    apt_kernels.patch(model, prefix_length=3)
    apt_kernels.add_adapter(model, "b", prefix_length=2)
    given = models.inputs("bert", batch=2)
    model(**given, adapter_names=["default", "b"])  # both heads have their start values
    with torch.no_grad():
        model.classifier.weight.add_(1)
    with pytest.raises(
        PatchError, match=r"'default' and the active adapter is 'b', whose values of classifier\.weight"
    ):
        model(**given, adapter_names=["default", "b"])
    with pytest.raises(PatchError, match="'__base__' and the active adapter"):
        model(**given, adapter_names=["b", BASE])
    model.bert(**given, adapter_names=["default", "b"])  # the body has no head


def test_a_cast_since_the_patch_makes_no_difference_between_task_heads():
    model = apt_kernels.patch(models.build("bert", "AutoModelForSequenceClassification"), prefix_length=3)
    apt_kernels.add_adapter(model, "b", prefix_length=2)
    apt_kernels.add_adapter(model, "c", prefix_length=2, trainable=[])
    given = models.inputs("bert", batch=3)
    model.to(torch.bfloat16)
    model(**given, adapter_names=["default", "b", BASE])
    apt_kernels.compose(model, ["b", "c"], "both")


def test_a_head_that_trains_in_float32_on_a_half_precision_base_is_compared_in_float32():
    base = models.build("bert", "AutoModelForSequenceClassification").to(torch.bfloat16)
    model = apt_kernels.patch(base, prefix_length=3)
    with torch.no_grad():
        model.classifier.weight.mul_(1 + 1e-4)  # less than bfloat16 resolves
    with pytest.raises(PatchError, match=r"values of classifier\.weight differ"):
        model(**models.inputs("bert", batch=2), adapter_names=["default", BASE])


def test_an_adapter_cannot_have_the_name_of_no_adapter():
    _, patched = several("llama")
    with pytest.raises(ConfigError, match="'__base__'"):
        apt_kernels.add_adapter(patched, BASE, prefix_length=2)


def test_unpatch_leaves_nothing():
    plain, patched = several("gpt2")
    apt_kernels.unpatch(patched)
    assert type(patched) is type(plain)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(m.__dict__) for m in patched.modules()] == [sorted(m.__dict__) for m in plain.modules()]


def test_prefix_dropout_of_parked_adapters_is_off_in_evaluation():
    _, patched = several("llama")
    apt_kernels.add_adapter(patched.train(), "d", prefix_length=4, prefix_dropout=0.5)
    randomise(patched, 4)
    apt_kernels.set_adapter(patched, "a").eval()
    given = models.inputs("llama")
    logits = [patched(**given, adapter_names=["d", "a", "d"]).logits for _ in range(2)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("fault", ["order", "gate"])
def test_planted_faults_are_noticed(fault, monkeypatch):
    plain, patched = several("llama", ("token", "static", "token"))
    given = models.inputs("llama", batch=len(NAMES))
    if fault == "order":
        monkeypatch.setattr(rows_module.Mixture, "rows", lambda self, batch: self.index[1:] + self.index[:1])
    else:
        gates = rows_module._gates
        monkeypatch.setattr(rows_module, "_gates", lambda *given: gates(*given).roll(1, 0))
    logits = patched(**given, adapter_names=NAMES).logits
    expected = torch.cat([alone(plain, patched, n)(**row(given, i)).logits for i, n in enumerate(NAMES)])
    assert (logits - expected).abs().max() > 1e-3
