"""The behaviour of PEFT's prefix tuning for each capability: a probe runs it and compares with recomputation."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import tempfile
import warnings

import peft
import torch
import transformers

from helpers import models

from .peft_models import LENGTH, NEW, AsUnpatched, Wrong, build, check, head_for, prefix_of, prompt, same, strengthen


def choose_next(model, family: str, ids, decoded, choose):
    """One step of decoding by recomputing everything, without a cache in between."""
    if family in models.SEQ2SEQ:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoded).logits
    else:
        logits = model(input_ids=decoded, attention_mask=torch.ones_like(decoded)).logits
    return torch.cat([decoded, choose(logits[:, -1])], dim=1)


@torch.no_grad()
def recomputed(model, family: str, ids, choose=lambda logits: logits.argmax(-1, keepdim=True)):
    """Tokens for prompts of one length without padding."""
    start = model.get_base_model().config.decoder_start_token_id if family in models.SEQ2SEQ else None
    decoded = ids if start is None else torch.full((len(ids), 1), start)
    for _ in range(NEW):
        decoded = choose_next(model, family, ids, decoded, lambda logits: choose(without_end(model, logits)))
    return decoded[:, -NEW:]


def without_end(model, logits):
    """As `min_new_tokens` has it: the end is not chosen."""
    end = model.get_base_model().generation_config.eos_token_id
    if end is None or end >= logits.shape[-1]:
        return logits
    return logits.index_fill(-1, torch.tensor([end]), -torch.inf)


@torch.no_grad()
def influence(model, family: str) -> None:
    """Check that PEFT's own forward depends on the prefix; otherwise the comparison shows nothing."""
    given = models.inputs(family)
    found, bare = model(**given), model.get_base_model()(**given)
    found, bare = (next(iter(out.values())) for out in (found, bare))
    check((found - bare).abs().max() > 1e-6, "the prefix has no influence")


def generate(model, given, **options):
    options = {"do_sample": False, **options}
    out = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return out[:, -NEW:] if isinstance(out, torch.Tensor) else out


def decodes(batch: int = 3, **options):
    """A probe: generation with ``options`` equals recomputation, for prompts of one length."""

    def probe(family):
        model, given = build(family), prompt(family, batch=batch)
        influence(model, family)
        asked = dict(options)
        if "assistant_model" in asked:
            asked["assistant_model"] = models.build(family).double()
        same(generate(model, given, **asked), recomputed(model, family, given["input_ids"]))

    return probe


def left_padding(family):
    """Short prompts, so that a window reaches the prefix. An encoder is padded on the right."""
    model = build(family)
    influence(model, family)
    if not padding_is_unseen(models.build(family).double(), family):
        raise AsUnpatched("the unpatched model differs too: its own positions or masks")
    check(padding_is_unseen(model, family), "a padded row generates otherwise than alone")


def padding_is_unseen(model, family: str) -> bool:
    given = prompt(family, "right" if family in models.SEQ2SEQ else "left", length=8)
    for beams in (1, 3):
        together = generate(model, given, num_beams=beams)
        for row in range(3):
            alone = given["input_ids"][row, given["attention_mask"][row].bool()][None]
            found = generate(model, {"input_ids": alone, "attention_mask": torch.ones_like(alone)}, num_beams=beams)
            if not torch.equal(together[row : row + 1], found):
                return False
    return True


def sampling(family):
    model, given = build(family), prompt(family)
    influence(model, family)

    def draw(logits):
        top = logits.topk(20).values[:, -1:]
        return torch.multinomial(logits.masked_fill(logits < top, -torch.inf).softmax(-1), 1)

    torch.manual_seed(3)
    found = generate(model, given, do_sample=True, top_k=20)
    torch.manual_seed(3)
    same(found, recomputed(model, family, given["input_ids"], draw))


def from_embeds(family):
    model, given = build(family), prompt(family)
    embeds = model.get_base_model().get_input_embeddings()(given["input_ids"])
    found = generate(model, {"inputs_embeds": embeds, "attention_mask": given["attention_mask"]})
    same(found, recomputed(model, family, given["input_ids"]))


def continuing(family):
    model = build(family)
    prompts = [prompt(family, seed=seed) for seed in (0, 1)]
    keep = {"return_dict_in_generate": True}
    influence(model, family)
    for old in [generate(model, given, **keep) for given in prompts]:
        longer = {"input_ids": old.sequences, "attention_mask": torch.ones_like(old.sequences)}
        found = generate(model, {**longer, "past_key_values": old.past_key_values})
        same(found, recomputed(model, family, old.sequences))


def quantised_cache(family):
    model, given = build(family).float(), prompt(family)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    out = generate(model, given, **options, output_logits=True, return_dict_in_generate=True)
    want = generate(model, given, output_logits=True, return_dict_in_generate=True)
    check(torch.allclose(out.logits[0], want.logits[0], atol=1e-4), "the prompt's own logits differ")


def continuous(family):
    model = build(family)
    rows = [models.inputs(family, batch=1, length=n, seed=n)["input_ids"] for n in (4, 3)]
    settings = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, page_size=8)
    influence(model, family)
    found = model.generate_batch(
        [row[0].tolist() for row in rows],
        generation_config=transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=settings,
    )
    check(len(found) == len(rows), "no result for a prompt")
    for out, row in zip(found.values(), rows):
        check(out.error is None, str(out.error))
        decoded = row
        with torch.no_grad():
            for _ in range(NEW):
                decoded = choose_next(model, family, row, decoded, lambda logits: logits.argmax(-1, keepdim=True))
        same(torch.tensor([out.generated_tokens]), decoded[:, -NEW:], "the prefix is dropped")


def packed(**more):
    def probe(family):
        if family in models.SEQ2SEQ:
            raise AsUnpatched("the unpatched model packs no documents either")
        model = build(family, None if family not in models.ENCODERS else "AutoModelForTokenClassification")
        rows = [models.inputs(family, batch=1, length=n, seed=n)["input_ids"] for n in (5, 8)]
        given = {"input_ids": torch.cat(rows, 1), "position_ids": torch.cat([torch.arange(5), torch.arange(8)])[None]}
        with torch.no_grad():
            together = model(**given, **more).logits
            alone = torch.cat([model(input_ids=row).logits for row in rows], 1)
        same(together, alone, "documents see each other, or not the prefix")

    return probe


_BOUNDARIES = torch.tensor([0, 5, 13], dtype=torch.int32)
_CU = {"cu_seq_lens_q": _BOUNDARIES, "cu_seq_lens_k": _BOUNDARIES, "max_length_q": 8, "max_length_k": 8}


def window(family):
    """The last token's gradient to the prefix, in the layer that has a window."""
    model, given = build(family), prompt(family, batch=1)
    model(**given).logits[:, -1].square().sum().backward()
    weight = next(p for n, p in model.named_parameters() if "prompt_encoder" in n)
    check(weight.grad is not None and weight.grad.abs().max() > 0, "late queries have no gradient to the prefix")
    per_token = weight.grad.abs().amax(dim=1)
    check(bool((per_token > 0).all()), "late queries have no gradient to part of the prefix")


def gradients(head: str | None = None, checkpointing: dict | None = None, labels=None):
    """A forward and a backward; every prefix parameter must get a gradient."""

    def probe(family):
        given = models.inputs(family)
        model = build(family, head or ("AutoModelForSequenceClassification" if family in models.ENCODERS else None))
        model.train()
        expected = None
        influence(model, family)
        if checkpointing is not None:
            model(**given).logits.square().mean().backward()
            expected = [p.grad.clone() for p in prefix_of(model)]
            model.zero_grad()
            model.gradient_checkpointing_enable(checkpointing)
        out = model(**given)
        tensor = next(
            t for t in (out.get("logits"), out.get("start_logits"), out.get("last_hidden_state")) if t is not None
        )
        tensor.square().mean().backward()
        grads = [p.grad for p in prefix_of(model)]
        check(all(g is not None and g.abs().max() > 0 for g in grads), "the prefix gets no gradient")
        check(all(bool((g.abs().amax(dim=0) > 0).all()) for g in grads), "part of the prefix gets no gradient")
        if expected is not None:
            check(all(torch.allclose(a, b) for a, b in zip(grads, expected)), "other gradients than without")

    return probe


def right_padding(family):
    """Padded rows give what they give alone, and train the whole prefix. (Left padding: see generation.)"""
    head = "AutoModelForSequenceClassification" if family in models.ENCODERS else None
    if not rows_are_alone(models.build(family, head).double(), family):
        raise AsUnpatched("the unpatched model differs too: not a number in rows without a visible token")
    check(rows_are_alone(build(family, head), family), "a padded row gives otherwise than alone")
    gradients()(family)


@torch.no_grad()
def rows_are_alone(model, family: str) -> bool:
    given = models.inputs(family, "right")
    together = model(**given).logits
    for row in range(3):
        real = given["attention_mask"][row].bool()
        alone = {n: t[row : row + 1] for n, t in given.items()}
        alone |= {n: t[:, real] for n, t in alone.items() if n in ("input_ids", "attention_mask")}
        found = model(**alone).logits
        if not torch.allclose(together[row : row + 1, : found.shape[1]], found, rtol=1e-6, atol=1e-8):
            return False
    return True


def compiled(family):
    torch._dynamo.reset()
    model = build(family, "AutoModelForSequenceClassification" if family in models.ENCODERS else None)
    made = torch.compile(model, fullgraph=True, backend="eager")
    influence(model, family)
    for length in (7, 12):
        given = models.inputs(family, length=length)
        same(made(**given).logits, model(**given).logits, "another result than without compiling")


def switched_off(family):
    head = "AutoModelForSequenceClassification" if family in models.ENCODERS else None
    model, given = build(family, head), models.inputs(family)
    expected = models.build(family, head).double()
    with torch.no_grad(), model.disable_adapter():
        found = model(**given).logits
    expected.load_state_dict(plain_state(model, expected))
    same(found, expected(**given).logits, "not the base model's result")


def plain_state(model, like):
    """The base model's own weights, PEFT's copies of trained heads aside."""
    state = model.get_base_model().state_dict()
    return {
        n: state.get(n, state.get(n.replace("classifier.", "classifier.original_module."))) for n in like.state_dict()
    }


def several(family):
    """Two adapters, switched: each gives its own results again."""
    head = "AutoModelForSequenceClassification" if family in models.ENCODERS else None
    model, given = build(family, head), models.inputs(family)
    with torch.no_grad():
        first = model(**given).logits
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.set_adapter("other")
        model.double()
        strengthen(model, "other", seed=2)
        check(not torch.allclose(model(**given).logits, first), "the second adapter gives what the first gave")
        model.set_adapter("default")
        same(model(**given).logits, first, "the first adapter is not what it was")


def two_adapters(family):
    """A model with the adapters "default" and "other", active in this order, and a batch of two rows."""
    model, given = build(family, head_for(family)), models.inputs(family, batch=2)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.double()
    strengthen(model, "other", seed=2)
    return model, given


def by_row(family):
    """Each row of a mixed batch gets the result of its adapter."""
    model, given = two_adapters(family)
    with torch.no_grad():
        mixed, expected = model(**given, adapter_names=["default", "other"]).logits, []
        for i, name in enumerate(("default", "other")):
            model.set_adapter(name)
            expected.append(model(**given).logits[i])
    same(mixed, torch.stack(expected), "every row gets the active adapter: adapter_names is ignored")


def generating_by_row(family):
    model, given = two_adapters(family)
    given.pop("decoder_input_ids", None)
    options, expected = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False), []
    mixed = model.generate(**given, **options, adapter_names=["default", "other"])
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        expected.append(model.generate(**given, **options)[i])
    check(torch.equal(mixed, torch.stack(expected)), "every row gets the active adapter: adapter_names is ignored")


def together(family):
    model, _ = two_adapters(family)
    model.set_adapter(["default", "other"])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check(all(any(f".{each}." in name for name in names) for each in ("default", "other")), "one of them trains")


def with_lora(family):
    model = peft.get_peft_model(models.build(family), peft.LoraConfig(target_modules="all-linear", r=2))
    model.add_adapter("prefix", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))


def saved(family):
    head = "AutoModelForSequenceClassification" if family in models.ENCODERS else None
    model, given = build(family, head), models.inputs(family)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(models.build(family, head).double(), folder).double().eval()
        found, expected = again(**given).logits, model(**given).logits
        # PEFT stores the prefix in float32.
        check(torch.allclose(found, expected, rtol=1e-4, atol=1e-4), "the loaded model differs")


def resumed(family):
    """Whether a saved adapter can be trained on."""
    model = build(family, "AutoModelForSequenceClassification" if family in models.ENCODERS else None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(
            models.build(family, "AutoModelForSequenceClassification" if family in models.ENCODERS else None),
            folder,
            is_trainable=True,
        )
        check(any(p.requires_grad for p in prefix_of(again)), "the loaded prefix does not train")


def lengths(family):
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=[2, 4])
    model = peft.get_peft_model(
        models.build(family), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=[2, 4])
    )
    model(**models.inputs(family))


def summary(family):
    model = build(family, "AutoModelForSequenceClassification" if family in models.ENCODERS else None)
    trainable, total = model.get_nb_trainable_parameters()
    check(trainable == sum(p.numel() for p in model.parameters() if p.requires_grad), "another number")
    check(total >= trainable, "another number")


def multiple_choice(family):
    model = build(family, "AutoModelForMultipleChoice")
    given = {n: t[:2, None].repeat(1, 2, 1) for n, t in models.inputs(family).items()}
    model.train()(**given).logits.square().mean().backward()
    check(all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix_of(model)), "the prefix gets no gradient")


def masked(family):
    model, given = build(family), models.inputs(family)
    model.train()(**given).logits.square().mean().backward()
    check(all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix_of(model)), "the prefix gets no gradient")


def labelled(family: str, **options) -> dict:
    given = models.inputs(family, **options)
    if family in models.SEQ2SEQ:
        return {**given, "labels": given.pop("decoder_input_ids")}
    return {**given, "labels": given["input_ids"][:, 0] % 2 if head_for(family) else given["input_ids"]}


def steps(model, given: dict, between=lambda: None) -> list[float]:
    """Losses of three steps that train what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    curve = []
    for _ in range(3):
        between()
        loss = model(**given).loss
        loss.backward()
        check(
            all(p.grad is not None and p.grad.abs().max() > 0 for p in prefix_of(model)), "the prefix gets no gradient"
        )
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def taken_off(family):
    """The model inside is the one from before."""
    model, given = build(family, head_for(family)), models.inputs(family)
    with torch.no_grad():
        base = models.build(family, head_for(family)).double()
        base.load_state_dict(plain_state(model, base))
        found, expected = (next(iter(each(**given).values())) for each in (model.get_base_model(), base))
    check(torch.equal(found, expected), "another result than before")


def mixed(family):
    """A bfloat16 base under a float32 prefix, near the same in float32."""
    model, given = build(family, head_for(family)).float(), models.inputs(family)
    with torch.no_grad():
        expected = model(**given).logits
    model.bfloat16()
    for prefix in prefix_of(model):
        prefix.data = prefix.data.float()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**given).logits
            logits.float().square().mean().backward()
        check((logits - expected).norm() < 0.1 * expected.norm(), "far from float32")
        grads = [p.grad for p in prefix_of(model)]
        check(all(g is not None and g.abs().max() > 0 for g in grads), "the prefix gets no gradient")


def generating_between(family):
    given, curves = labelled(family, padding="left"), []
    prompts = {n: t for n, t in given.items() if n in ("input_ids", "attention_mask")}
    for generating in (False, True):
        torch.manual_seed(0)
        model = build(family).float().train()  # in float64 Gemma 2 gives no numbers where padding hides all
        curves.append(steps(model, given, functools.partial(generate, model, prompts) if generating else lambda: None))
    check(curves[0] == curves[1], "generation disturbs the training")


def accelerated(family):
    import accelerate

    curves = []
    for wrap in (lambda m: m, lambda m: accelerate.Accelerator(cpu=True).prepare(m)):
        curves.append(steps(wrap(build(family, head_for(family)).train()), labelled(family)))
    check(curves[0] == curves[1], "other losses than without")


def predictions(family):
    model, data = build(family, head_for(family)).float(), labelled(family)
    rows = [{n: t[i] for n, t in data.items()} for i in range(3)]
    with torch.no_grad():
        expected = torch.cat([model(**{n: t[None] for n, t in row.items()}).logits for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(folder, report_to=[], disable_tqdm=True, use_cpu=True)
        found = transformers.Trainer(model, settings).predict(rows).predictions
    found = torch.tensor(found[0] if isinstance(found, tuple) else found)
    # float32, in which a batch and its single rows are rounded otherwise on some processors.
    same(found, expected, "other predictions than the model's own", rtol=1e-4, atol=1e-5)


def compiled_steps(family):
    torch._dynamo.reset()
    model = build(family, head_for(family)).train()
    made = torch.compile(model, fullgraph=True, backend="eager")
    for length in (7, 12):
        given, grads = models.inputs(family, length=length), []
        for each in (made, model):
            model.zero_grad()
            each(**given).logits.square().mean().backward()
            check(all(p.grad is not None for p in prefix_of(model)), "the prefix gets no gradient")
            grads.append([p.grad.clone() for p in prefix_of(model)])
        check(all(torch.allclose(a, b) for a, b in zip(*grads)), "other gradients than without compiling")


PROBES = {
    "unpatch, bit for bit": taken_off,
    "mixed precision: bfloat16 base, float32 prefix, with autocast and without": mixed,
    "generation between training steps, as reinforcement learning does it": generating_between,
    "Accelerate": accelerated,
    "Trainer: predictions": predictions,
    "torch.compile of training steps, dynamic lengths, no recompilation per length": compiled_steps,
    "outputs and gradients, padding on either side": right_padding,
    "gradient checkpointing, both kinds, switched on before or after the patch": gradients(
        checkpointing={"use_reentrant": False}
    ),
    "sliding window: every query sees the whole prefix": window,
    "packed documents by position ids": packed(use_cache=False),
    "packed documents by cu_seq_lens": packed(**_CU),
    "greedy and beam search, left padding": left_padding,
    "a row alone and padded in a batch": left_padding,
    "seeded sampling": sampling,
    "prompt-lookup decoding": decodes(1, prompt_lookup_num_tokens=3),
    "assisted decoding": decodes(1, assistant_model=None),
    "no cache (use_cache=False)": decodes(use_cache=False),
    "static cache": decodes(cache_implementation="static", disable_compile=True),
    "sliding-window cache": decodes(cache_implementation="sliding_window", disable_compile=True),
    "quantised cache": quantised_cache,
    "generation from inputs_embeds": from_embeds,
    "chunked prefill": decodes(prefill_chunk_size=3),
    "continuing from a returned cache": continuing,
    "interleaved generations": continuing,
    "continuous batching": continuous,
    "compiled decoding": decodes(cache_implementation="static", disable_compile=True),
    "torch.compile, dynamic lengths": compiled,
    "prefix off and on by a context manager": switched_off,
    "several named adapters": several,
    "a batch with an adapter for each row (adapter_names), or none": by_row,
    "generation with an adapter for each row, two kinds of caches and none": generating_by_row,
    "several adapters that train together, each on its rows": together,
    "LoRA and other PEFT methods on the same model, patched before or after, merged and unmerged": with_lora,
    "save and load": saved,
    "Trainer: checkpoint without base weights, resume with equal losses, best model": resumed,
    "which layers, by name, index or kind; a length each": lengths,
    "summary of what trains": summary,
    "causal language model": gradients("AutoModelForCausalLM"),
    "masked language model": masked,
    "sequence classification": gradients("AutoModelForSequenceClassification"),
    "token classification": gradients("AutoModelForTokenClassification"),
    "question answering": gradients("AutoModelForQuestionAnswering"),
    "multiple choice": multiple_choice,
    "embeddings (bare model)": gradients("AutoModel"),
    "sequence to sequence": gradients(),
    "reward (one number a sequence)": gradients("AutoModelForSequenceClassification"),
}


def verdict(probe, family: str) -> list:
    """``[word, reason]``: right, WRONG and what differs, or raises and the error."""
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            torch.manual_seed(0)
            probe(family)
    except Wrong as wrong:
        said = sorted({str(each.message) for each in warned if f"{os.sep}peft{os.sep}" in each.filename})
        return ["WRONG", str(wrong) + (f"; it warns: {' '.join(said)}" if said else "")]
    except AsUnpatched as excused:
        return ["as unpatched", str(excused)]
    except Exception as error:  # any error of PEFT is its result in the table
        said = (str(error).strip().splitlines() or [""])[0]
        return ["raises", f"{type(error).__name__}: {said[:150]}"]
    return ["right", None]


def run(only: str | None = None) -> dict:
    """``capability -> family -> [word, reason]``."""
    from . import catalog

    transformers.logging.set_verbosity_error()
    listed, found = catalog.listed(), {}
    for capability, probe in PROBES.items():
        if only and only not in capability:
            continue
        absent = listed.get(capability, {})
        found[capability] = {f: verdict(probe, f) for f in models.FAMILIES if f not in absent}
    return found
