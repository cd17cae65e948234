"""One architecture: built tiny, patched, and compared with the oracle."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from contextlib import contextmanager
from functools import partial

import torch
import transformers
from torch import Tensor

import apt_kernels
import apt_kernels.hf.state
from apt_kernels.hf.discovery.selection import KINDS
from helpers import columns

from . import feeds, shrink
from . import overrides as overrides_of

# Everything runs in float64: what is left is the order of sums, and ill-conditioned tiny models.
RTOL, ATOL = 1e-8, 1e-9
PREFIX = 5


class Failed(Exception):
    """A check that did not hold: at which stage, and why."""

    def __init__(self, stage: str, why: str):
        super().__init__(why)
        self.stage, self.why = stage, why


def everything_in_float64() -> None:
    """Make torch's float32 mean float64 in this process, so that models which compute in float32 are exact too."""
    torch.set_default_dtype(torch.float64)
    for name in ("float32", "float", "bfloat16", "float16", "half"):
        setattr(torch, name, torch.float64)
    Tensor.float = Tensor.double


@contextmanager
def stage(name: str):
    """Turns any error inside into `Failed` at this stage."""
    try:
        yield
    except Failed:
        raise
    except Exception as error:  # any failure is the reason in that row
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, apt_kernels.PatchError) else f"{type(error).__name__}: "
        raise Failed(name, f"{kind}{lines[0][:300]}") from error


def check(model_type: str, kind: str, overrides: dict | None = None) -> dict:
    """``{"green": bool, "stage": ..., "reason": ..., "checks": [...], ...}`` of one architecture."""
    started = time.monotonic()
    result = {"type": model_type, "kind": kind, "green": False, "checks": []}
    try:
        _check(model_type, kind, overrides or {}, result)
        result["green"] = True
    except Failed as failure:
        result.update(stage=failure.stage, reason=failure.why)
        cause = failure.__cause__
        if cause is not None:
            import traceback

            result["traceback"] = "".join(traceback.format_exception(cause))[-3000:]
    result["seconds"] = round(time.monotonic() - started, 2)
    return result


def build(model_type: str, kind: str, overrides: dict):
    """A perturbed tiny model in evaluation mode."""
    config = shrink.tiny(model_type, copy.deepcopy(overrides))
    if kind == "causal" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    config._experts_implementation = "eager"  # the grouped kernels have no float64
    auto, classes = getattr(transformers, feeds.KINDS[kind].auto), feeds.classes(kind)[model_type]
    if isinstance(classes, tuple):
        config.architectures = [classes[0]]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(copy.deepcopy(config)).parameters())
    if size > 70e6:  # convolutions, most of them, whose sizes are lists
        raise Failed("build", f"the tiny config still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).double().eval()
    shrink.perturb(model)
    return model


def _check(model_type: str, kind: str, overrides: dict, result: dict) -> None:
    with stage("build"):
        plain = build(model_type, kind, overrides)
        result["class"] = type(plain).__name__
        kind = feeds.style(plain, kind)
    with stage("run unpatched"):
        given = [("", feed) for feed in feeds.feeds(plain, kind)]
    with stage("patch"), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patched = apt_kernels.patch(copy.deepcopy(plain), prefix_length=PREFIX, init_seed=0, trainable=".").double()
        _randomise(patched)
        prefixes = apt_kernels.prefixes(patched)
        result["sites"] = len(prefixes)
        result["senses"] = _senses(patched)
        result["left out"] = [str(w.message) for w in warned if "stays without a prefix" in str(w.message)]
    with stage("run a part alone"):
        given += [(part, feeds.part(plain.get_submodule(part))) for part in _unreached_parts(patched, given)]
        result["alone"] = [part for part, _ in given if part]
    with torch.no_grad():
        unpatched = [_output(plain.get_submodule(part), feed) for part, feed in given]
    with stage("oracle"):
        from_end = model_type in overrides_of.FROM_END
        choices = _attention_of(plain, given, unpatched)
    for attention in choices:
        try:
            _compare(plain, patched, given, unpatched, kind, {"from_end": from_end, "attention": attention})
            break
        except Failed:
            if attention == choices[-1]:
                raise
    if len(choices) > 1:
        result["attention"] = f"as its own {attention} attention, which differs from its other one"
    result["checks"] += ["outputs", "influence", "gradients"]
    text = given[0][1]
    if kind == "vision-language" and feeds.is_text_alone(plain, text):
        kind = "causal"
    if kind == "causal":
        with stage("causality"):
            try:
                _causality(plain, text)
            except Failed:
                result["causality"] = "the unpatched model is not causal"
            else:
                _causality(patched, text)
                result["checks"].append("causality")
    if kind in ("causal", "seq2seq"):
        with stage("cache"):
            cached = _cached_equals_uncached(plain, patched, text, kind)
        result["cache"] = cached
        if cached == "equal":
            result["checks"].append("cache")


def _compare(plain, patched, given: list[tuple[str, dict]], unpatched: list[Tensor], kind: str, options: dict) -> None:
    """Outputs, influence and gradients, against the oracle that runs by ``options``."""
    patched.zero_grad(set_to_none=True)
    with stage("oracle"):
        expecting, params, context = columns.build(plain, apt_kernels.prefixes(patched), **options)
    for parameter in expecting.parameters():
        parameter.requires_grad_()
    expected_loss = found_loss = 0.0
    for index, (part, feed) in enumerate(given):
        rows = feeds.rows(feed, kind)
        with stage("oracle"):
            feeds.tell_padding(expecting, feed, kind)
            with context():
                expected = _output(expecting.get_submodule(part), feed)
        with stage("outputs"):
            found = _output(patched.get_submodule(part), feed)
            _same("outputs", found[rows], expected[rows])
        moved = (expected - unpatched[index])[rows].abs().max().item()
        if not moved > 1e-4:
            raise Failed("influence", f"the prefix moves the output by {moved:.1g} only")
        weight = torch.randn(found[rows].shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        expected_loss = expected_loss + (expected[rows] * weight).sum()
        found_loss = found_loss + (found[rows] * weight).sum()
    with stage("gradients"):
        expected_loss.backward()
        found_loss.backward()
        _gradients(patched, expecting, params)


def _attention_of(plain, given: list[tuple[str, dict]], unpatched: list[Tensor]) -> tuple[str, ...]:
    """The oracle's attention: eager, or both sdpa and eager if the two of a model compute different results.

    Some bidirectional modules are marked as causal: transformers' sdpa function then hides later keys, eager attention
    does not. Such a model may equal either.
    """
    eager, _, context = columns.build(plain, {})
    with torch.no_grad(), context():
        for (part, feed), wanted in zip(given, unpatched):
            found, mask = _output(eager.get_submodule(part), feed), feed.get("attention_mask")
            apart = (found - wanted).nan_to_num().abs()
            if mask is not None and mask.shape == apart.shape[:2]:
                apart = apart[mask.bool()]  # what sees no token is zero in one, an average in the other
            if apart.max() > 1e-6:
                return "sdpa", "eager"
    return ("eager",)


def _senses(patched) -> dict[str, int]:
    """The number of prefixes in the text, vision and audio parts of the model."""
    sites = apt_kernels.hf.state.state_of(patched).sites
    return {part: sum(KINDS[part](site) for site in sites) for part in ("text", "vision", "audio")}


def _unreached_parts(patched, given: list[tuple[str, dict]]) -> list[str]:
    """The outermost models inside ``patched`` with prefixes of which none ran in the forwards ``given``."""
    served, handles = set(), []
    for name in apt_kernels.prefixes(patched):
        note = partial(lambda name, *_: served.add(name), name)
        handles.append(patched.get_submodule(name).register_forward_hook(note))
    with torch.no_grad():
        for _, feed in given:
            patched(**feed)
    for handle in handles:
        handle.remove()
    left, parts = [name for name in apt_kernels.prefixes(patched) if name not in served], []
    for name, module in patched.named_modules():
        inside = [site for site in left if f"{site}.".startswith(f"{name}.")]
        if name and inside and isinstance(module, transformers.PreTrainedModel):
            if any(f"{site}.".startswith(f"{name}.") for site in served):
                continue  # only some of it; what is inside is looked at by itself
            parts.append(name)
            left = [site for site in left if site not in inside]
    return parts


def _output(model, feed: dict) -> Tensor:
    torch.manual_seed(0)  # some draw what they are not given
    out = model(**feed)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        found = getattr(out, name, None)
        if isinstance(found, Tensor):
            return found
    return next(x for x in out.to_tuple() if isinstance(x, Tensor) and x.is_floating_point())


def _randomise(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for prefix in apt_kernels.prefixes(model).values():
            for name, parameter in prefix.named_parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(draw * {"layer_scale": 0.3, "gate_weight": 0.1}.get(name, 0.7))


def _same(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise Failed(name, f"shape {list(found.shape)} for {list(expected.shape)}")
    if not bool(expected.isfinite().all()):
        raise Failed(name, "the oracle is not finite")
    error = (found - expected).abs()
    allowed = ATOL * max(1.0, expected.abs().max().item()) + RTOL * expected.abs()
    if not bool((error <= allowed).all()):
        raise Failed(name, f"off by {error.max():.2g} where values reach {expected.abs().max():.2g}")


def _gradients(patched, expecting, params: dict) -> None:
    found = dict(patched.named_parameters())
    wanted = {**params, **{n: p for n, p in expecting.named_parameters()}}
    missing = set(found) - set(wanted)
    if missing:
        raise Failed("gradients", f"{sorted(missing)[0]} has no counterpart")
    scale = max(p.grad.abs().max().item() for p in wanted.values() if p.grad is not None and p.numel())
    for name, parameter in wanted.items():
        mine = found[name].grad
        if parameter.numel() == 0:
            continue
        if name in params and (parameter.grad is None or not parameter.grad.abs().max() > 0):
            raise Failed("influence", f"{name} has no gradient: that prefix has no influence")
        if parameter.grad is None:
            if mine is not None and mine.abs().max() > ATOL * scale:
                raise Failed("gradients", f"{name} has a gradient, the oracle's has none")
            continue
        if mine is None:
            if parameter.grad.abs().max() > ATOL * scale:
                raise Failed("gradients", f"{name} has no gradient, the oracle's has one")
            continue
        error = (mine - parameter.grad).abs()
        allowed = (
            10 * ATOL * max(1.0, parameter.grad.abs().max().item(), 1e-2 * scale) + 10 * RTOL * parameter.grad.abs()
        )
        if not bool((error <= allowed).all()):
            raise Failed(
                "gradients", f"{name} is off by {error.max():.2g}; it reaches {parameter.grad.abs().max():.2g}"
            )


def _causality(model, feed: dict) -> None:
    """The first tokens' outputs do not depend on later tokens."""
    kept = feed["input_ids"].shape[1] - 4
    later = dict(feed)
    later["input_ids"] = feed["input_ids"].clone()
    later["input_ids"][:, kept:] = later["input_ids"][:, kept:].flip(1).roll(1, 0) + 1
    beginning = {name: value[:, :kept] for name, value in feed.items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        a, b = _output(model, feed), _output(model, later)
    _same("causality", b[:, :kept], a[:, :kept])
    if torch.equal(a[:, kept:], b[:, kept:]):
        raise Failed("causality", "later tokens have no influence on themselves")
    with torch.no_grad():
        alone = _output(model, {**feed, **beginning})
    _same("causality", alone, a[:, :kept])


def _cached_equals_uncached(plain, patched, feed: dict, kind: str) -> str:
    """``"equal"``, or why the model's own cache cannot be compared."""
    own = _decode(plain, feed, kind)
    if isinstance(own, str):
        return own
    try:
        _same("cache", *own)
    except Failed as failure:
        return f"the unpatched model's cached decoding differs from uncached ({failure.why})"
    ours = _decode(patched, feed, kind)
    if isinstance(ours, str):
        raise Failed("cache", ours)
    _same("cache", *ours)
    return "equal"


def _decode(model, feed: dict, kind: str) -> tuple[Tensor, Tensor] | str:
    """Logits of a prompt and two single steps through the cache, and of one pass without."""
    name = "decoder_input_ids" if kind == "seq2seq" else "input_ids"
    ids, accepted = feed[name], inspect.signature(model.forward).parameters
    prompt = ids.shape[1] - 2
    fixed = {k: v for k, v in feed.items() if k not in (name, "attention_mask", "use_cache")}
    with torch.no_grad():
        whole = _output(model, feed)
        pieces, cache = [], None
        for start, stop in ((0, prompt), (prompt, prompt + 1), (prompt + 1, prompt + 2)):
            step = {**fixed, name: ids[:, start:stop], "use_cache": True}
            if kind == "seq2seq":
                if "attention_mask" in feed:
                    step["attention_mask"] = feed["attention_mask"]
            elif "attention_mask" in accepted:
                step["attention_mask"] = torch.ones_like(ids[:, :stop])
            if cache is not None:
                step["past_key_values"] = cache
            try:
                out = model(**step)
            except Exception as error:  # the model wants more at each step than is known here
                return _generate(model, feed, error)
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                return "the model returns no cache"
            pieces.append(_output_of(out))
    return torch.cat(pieces, 1)[:, -2:], whole[:, -2:]


def _generate(model, feed: dict, error: Exception) -> tuple[Tensor, Tensor] | str:
    """The same by `generate`, for models that need more than their cache at each step."""
    try:
        given = {name: value for name, value in feed.items() if name in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        cached, whole = (model.generate(**given, **options, use_cache=use) for use in (True, False))
        return torch.stack(cached.logits, 1), torch.stack(whole.logits, 1)
    except Exception:  # then the row says that its decoding was not checked, and why
        return f"no cached decoding step by hand ({type(error).__name__})"


def _output_of(out) -> Tensor:
    return out.logits
