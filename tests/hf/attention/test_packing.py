"""Packed documents: none sees another one; each sees the whole prefix with its own gate."""

import inspect

import pytest
import torch
import transformers

import apt_kernels
from apt_kernels.hf import calls
from apt_kernels.hf.attention import packing, subclass
from helpers import models
from helpers.patched import randomise

LENGTHS = (5, 1, 7, 3)
KINDS = {
    "position ids": {"return_flash_attn_kwargs": False},
    "cu_seq_lens": {"return_flash_attn_kwargs": True},
}
DECODERS = models.some(models.DECODERS)
SINGLE = models.some(models.ENCODERS + models.DECODERS)


def gates(family):
    return ("first", "mean", "token") if family in models.ENCODERS else ("first", "token")


def collated(family, **options):
    """The batch of `DataCollatorWithFlattening` for documents, and the documents."""
    rows = [models.inputs(family, batch=1, length=n, seed=n)["input_ids"] for n in LENGTHS]
    start = {"roberta": 2}.get(family, 0)
    known = inspect.signature(transformers.DataCollatorWithFlattening.__init__).parameters
    numbered = {"position_ids_start": start} if "position_ids_start" in known else {}
    collator = transformers.DataCollatorWithFlattening(**options, **numbered)
    given = collator([{"input_ids": row[0]} for row in rows], return_tensors="pt")
    given.pop("labels")
    if not numbered and start:
        given["position_ids"] += start
    return given, rows


def tuned(family, gate, **options):
    return randomised(apt_kernels.patch(models.build(family, **options).double(), prefix_length=4, gate=gate))


def randomised(model):
    randomise(model)
    return model


def check(model, given, rows):
    """Logits and gradients of the packed row equal those of its documents alone; the prefix has an effect on each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    packed = model(**given).logits
    alone = torch.cat([model(input_ids=row, **no_cache(model)).logits for row in rows], dim=1)
    torch.testing.assert_close(packed, alone)
    for found, expected in zip(gradients(packed, trained), gradients(alone, trained)):
        torch.testing.assert_close(found, expected)
    with apt_kernels.disabled(model), torch.no_grad():
        bare = torch.cat([model(input_ids=row, **no_cache(model)).logits for row in rows], dim=1)
    for part in (packed - bare).split(LENGTHS, dim=1):
        assert part.abs().amax(dim=-1).min() > 1e-3, "the prefix has no influence"


def gradients(logits, parameters):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    return torch.autograd.grad((logits * weight).sum(), parameters)


def no_cache(model):
    return {"use_cache": False} if model.config.model_type not in models.ENCODERS else {}


@pytest.mark.proves("packed documents by position ids")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("family", "gate"), [(f, g) for f in DECODERS for g in gates(f)])
def test_position_ids(family, gate, training):
    """In evaluation a model makes a cache unless told not to, and transformers then looks for no documents."""
    given, rows = collated(family)
    check(tuned(family, gate).train(training), given, rows)


@pytest.mark.proves("packed documents by cu_seq_lens")
@pytest.mark.parametrize(("family", "gate"), [(f, g) for f in SINGLE for g in gates(f)])
def test_cu_seq_lens(family, gate):
    given, rows = collated(family, return_flash_attn_kwargs=True)
    check(tuned(family, gate), given, rows)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_cu_seq_lens_alone(family):
    """Without position ids, each document's begin at 0."""
    given, rows = collated(family, return_flash_attn_kwargs=True, return_position_ids=False)
    assert "position_ids" not in given
    check(tuned(family, "first"), given, rows)
    assert calls.local.documents is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_known_when_a_checkpoint_is_recomputed(kind, reentrant):
    given, _ = collated("mistral", **KINDS[kind])
    model, found = tuned("mistral", "first").train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**given).logits.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_compile_whatever_the_cache(family, kind):
    torch._dynamo.reset()
    given, _ = collated(family, **KINDS[kind])
    model = tuned(family, "first")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    assert calls.local.documents is None


BAD = [
    ({"cu_seq_lens_q": torch.tensor([0, 5, 12])}, r"cu_seq_lens_q is \[0, 5, 12\]; it needs to rise from 0 to .* 16"),
    ({"cu_seq_lens_q": torch.tensor([5, 16])}, "rise from 0"),
    ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 16])}, "rise from 0"),
    ({"cu_seq_lens_q": torch.tensor([[0, 16]])}, "row of integers"),
    ({"cu_seq_lens_q": torch.tensor([0.0, 16.0])}, "row of integers"),
    ({"cu_seq_lens_q": torch.tensor([0, 16]), "cu_seq_lens_k": torch.tensor([0, 4, 16])}, "needs them equal"),
    ({"position_ids": torch.arange(8).repeat(2)[None], "use_cache": True}, "pass use_cache=False"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_right_is_refused(given, message):
    model, ids = tuned("llama", "token"), models.inputs("llama", batch=1, length=16)["input_ids"]
    with pytest.raises(apt_kernels.PatchError, match=message):
        model(input_ids=ids, **given)
    assert calls.local.documents is None
    assert model(input_ids=ids).logits.isfinite().all()


def test_several_rows_are_refused():
    given = models.inputs("llama", length=16)
    with pytest.raises(apt_kernels.PatchError, match="3 rows; it needs one row"):
        tuned("llama", "token")(**given, cu_seq_lens_q=torch.tensor([0, 16]))


@pytest.mark.proves(
    "packed documents by cu_seq_lens", refused="one set of boundaries does not fit an encoder's and a decoder's tokens"
)
@pytest.mark.parametrize("family", models.SEQ2SEQ)
def test_encoder_decoders_are_refused(family):
    given = models.inputs(family, batch=1)
    with pytest.raises(apt_kernels.PatchError, match="encoder-decoder"):
        tuned(family, "token")(**given, cu_seq_lens_q=torch.tensor([0, 5, 12]))


def test_attention_that_is_written_out_is_refused_where_it_would_leak():
    config = transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=99, n_positions=32)
    for gate in ("first", "token"):
        model = randomised(apt_kernels.patch(transformers.GPTJForCausalLM(config).double().eval(), gate=gate))
        given, rows = collated("gpt2", return_flash_attn_kwargs=True)
        with pytest.raises(apt_kernels.PatchError, match="does not read it"):
            model(**given)
        given, rows = collated("gpt2")
        if gate == "token":
            check(model, given, rows)
        else:
            with pytest.raises(apt_kernels.PatchError, match="do not see documents"):
                model(**given)


def test_what_reads_documents_goes_with_the_patch():
    model = models.build("llama")
    before = [type(module) for module in model.modules()]
    apt_kernels.patch(model)
    assert not model.apt_documents.gated
    apt_kernels.add_adapter(model, "x", gate="first")
    assert model.apt_documents.gated
    base, mixins = subclass.parts(type(model))
    assert base is transformers.LlamaForCausalLM
    assert mixins.count(packing.Packed) == 1
    assert [type(module) for module in apt_kernels.unpatch(model).modules()] == before
    assert not hasattr(model, "apt_documents")
