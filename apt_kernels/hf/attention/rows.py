"""A batch whose rows use different adapters: ``model(..., adapter_names=["a", "b", "__base__"])``, and `generate`.

The names belong to a call: they are in `calls.local` while it runs. At each attention module, the rows of every adapter
that has a prefix there get its gate, and one call of the op attends with a prefix for each row. Adapters that are not
active are constants: they get no gradient.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...errors import ConfigError, PatchError, counted
from .. import calls, offload
from ..state import module_at, same_values
from . import subclass

BASE = "__base__"
# The inputs whose first size is the number of rows.
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "inputs",
    "pixel_values",
    "input_features",
    "input_values",
    "decoder_input_ids",
)
_PARTS = ("prefix_key", "prefix_value", "gate", "layer_scale")


class Mixture:
    """The prefixes at one attention module, and which of them each row uses (-1: none)."""

    def __init__(self, prefixes: list, index: list[int], generating: bool):
        self.prefixes, self.index, self.generating = prefixes, index, generating
        self._places: dict[tuple[int, torch.device], tuple[Tensor, list[Tensor]]] = {}

    @property
    def implementation(self) -> str:
        """The first that an adapter asks for by name."""
        return next((p.implementation for p in self.prefixes if p.implementation != "auto"), "auto")

    def rows(self, batch: int) -> list[int]:
        """The prefix of each of ``batch`` rows. Generation repeats each row for its beams or returned sequences."""
        times, rest = divmod(batch, len(self.index))
        if rest or (times != 1 and not self.generating):
            raise ConfigError(
                f"adapter_names has {counted(len(self.index), 'name')}; {self.prefixes[0].name} attends over "
                f"{counted(batch, 'row')}, and it needs one name for each"
            )
        return [number for number in self.index for _ in range(times)]

    def places(self, batch: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """The prefix of each of ``batch`` rows, and the rows without one, with the first, the second, ..."""
        if (batch, device) not in self._places:  # every step of a generation asks for the same
            index = torch.tensor(self.rows(batch), device=device)
            rows = [(index == number).nonzero()[:, 0] for number in range(-1, len(self.prefixes))]
            self._places[batch, device] = index, rows
        return self._places[batch, device]

    def parts(self, batch: int, device: torch.device, part: Callable) -> dict[str, Tensor | None]:
        """The op's arguments. ``part(prefix, rows)``: key, value, gate and scale of a prefix for these rows.

        None in the place of the rows: all of them. The gate is that of the rows, or that of every row.
        """
        index, places = self.places(batch, device)
        if len(self.prefixes) == 1 and -1 not in self.index:
            return dict(zip(_PARTS, part(self.prefixes[0], None)))
        found = [part(prefix, rows) for prefix, rows in zip(self.prefixes, places[1:])]
        keys, values, gates, scales = zip(*found)
        lengths = [key.shape[1] for key in keys]
        joined: dict[str, Tensor | None] = dict.fromkeys(_PARTS)
        for name, parts in (("prefix_key", keys), ("prefix_value", values)):
            joined[name] = torch.stack([pad(p, (0, 0, 0, max(lengths) - p.shape[1])) for p in _alike(parts)])
        if any(gate is not None for gate in gates):
            joined["gate"] = _gates(gates, lengths, places)
        if any(scale is not None for scale in scales):
            like = next(scale for scale in scales if scale is not None)
            joined["layer_scale"] = torch.cat(_alike([like.new_ones(1) if s is None else s for s in scales]))
        joined["prefix_index"] = index
        joined["prefix_lengths"] = torch.tensor(lengths, device=device)
        return joined


def _alike(parts) -> list[Tensor]:
    """The tensors in the widest of their dtypes, on the first one's device."""
    dtype = parts[0].dtype
    for each in parts:
        dtype = torch.promote_types(dtype, each.dtype)
    return [each.to(parts[0].device, dtype) for each in parts]


def _gates(gates, lengths: list[int], places: list[Tensor]) -> Tensor:
    """The logits of all rows, ``[B, M]`` or ``[B, T, M]``; ``places``: the rows without a prefix, then others'."""
    like = next(gate for gate in gates if gate is not None)
    batch = sum(len(rows) for rows in places)
    queries = next((gate.shape[1:2] for gate in gates if gate is not None and gate.ndim == 3), ())
    made = [like.new_zeros(len(places[0]), *queries, max(lengths))]
    for gate, length, rows in zip(gates, lengths, places[1:]):
        if gate is None:
            gate = like.new_full((length,), torch.inf)  # exactly 1
        elif gate.ndim > 1 and gate.shape[0] == batch != len(rows):
            gate = gate.index_select(0, rows)
        if gate.ndim == 2 and queries:
            gate = gate[:, None]
        made.append(pad(gate, (0, max(lengths) - length)).expand(len(rows), *queries, -1))
    return torch.cat(_alike(made)).index_select(0, torch.cat(places).argsort())


class Rows:
    """The adapters of the rows of a running forward or generation of one model."""

    def __init__(self, state, names: tuple[str, ...], generating: bool):
        self.names, self.places = names, {}
        used = [name for name in dict.fromkeys(names) if name != BASE]
        for site in state.sites:
            module = module_at(state.model, site.name)
            here: dict[str, Any] = {}
            for name in used:
                prefix = _prefix_of(state, name, module, site.name)
                if prefix is not None:
                    here[name] = prefix
            order = list(here)
            index = [order.index(name) if name in here else -1 for name in names]
            self.places[module] = Mixture(list(here.values()), index, generating)

    @property
    def per_sequence(self) -> bool:
        """Whether a gate of one of the adapters is one for a whole sequence."""
        return any(prefix.gate_entry.per_sequence for each in self.places.values() for prefix in each.prefixes)


def _prefix_of(state, name: str, module: nn.Module, site: str) -> Any:
    """The prefix of an adapter at an attention module; None: it has none there. Only active adapters train."""
    if name == state.adapter:
        return getattr(module, "apt", None)
    if name in state.others:
        return next((each for each in getattr(module, "apt_others", ()) if each.adapter == name), None)
    prefix = state.parked[name].prefixes.get(site)
    return None if prefix is None else _constant(prefix, module)


def _constant(prefix: Any, module: nn.Module) -> Any:
    """A prefix with the same values as constants, on the device of its attention module, without dropout."""
    device = offload.device(module)

    def copied(part: Any) -> Any:
        made = copy.copy(part)
        made.__dict__["_parameters"] = {
            name: None if p is None else nn.Parameter(p.detach().to(device), requires_grad=False)
            for name, p in part._parameters.items()
        }
        made.__dict__["_modules"] = {name: None if m is None else copied(m) for name, m in part._modules.items()}
        made.training = False
        return made

    return copied(prefix)


def serving(module) -> tuple[Any, Mixture | None]:
    """The prefix with which a module attends now, None: without one; and the mixture, of which it is the first."""
    prefix, local = getattr(module, "apt", None), calls.local
    several = "apt_others" in module._modules
    if prefix is None and local.rows is None and not several:
        return None, None
    if local.disabled and calls.disabling_of(getattr(module, "apt_token", None)) is not None:
        return None, None
    if local.rows is None:
        return _alone(module, prefix, several), None
    if torch.compiler.is_compiling():
        raise PatchError("adapter_names is given inside torch.compile; call the model as it was before it was compiled")
    mixture = local.rows.places.get(module)
    if mixture is None:  # of another model
        return _alone(module, prefix, several), None
    return (mixture.prefixes[0] if mixture.prefixes else None), mixture


def _alone(module, prefix: Any, several: bool) -> Any:
    """The one prefix of all rows; `PatchError` if several adapters are active."""
    if several:
        names = [each.adapter for each in (prefix, *module.apt_others) if each is not None]
        raise PatchError(
            f"the adapters {', '.join(map(repr, names))} are active together, and the call does not say which rows use "
            "which: pass adapter_names=, with one name for each row, or set one adapter"
        )
    return prefix


class ByRow(subclass.Mixin):
    """Added to the class of a patched model and of its body: its forward takes ``adapter_names``."""

    apt_state: Any = None
    apt_replica = False

    def forward(self, *args, **kwargs):
        if "adapter_names" not in kwargs:
            if "peft_config" in self.__dict__ and not torch.compiler.is_compiling():
                _refuse_names_of_peft(self)
            return super().forward(*args, **kwargs)
        names = kwargs.pop("adapter_names")
        with running(self, names, args, kwargs, generating=False):
            return super().forward(*args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.apt_replica = True
        return replica


class GeneratesByRow(ByRow):
    """`ByRow` for a model that generates."""

    def generate(self, *args, adapter_names=None, **kwargs):
        with running(self, adapter_names, args, kwargs, generating=True):
            return super().generate(*args, **kwargs)

    def generate_batch(self, inputs, *args, adapter_names=None, **kwargs):
        if adapter_names is None:
            return super().generate_batch(inputs, *args, **kwargs)
        return _in_groups(self, super().generate_batch, inputs, adapter_names, args, kwargs)


@contextmanager
def running(module, names, args, kwargs, generating: bool) -> Iterator[None]:
    """Within this context, each row of the model uses the adapter of its name; None: all use the active one."""
    if names is None:
        yield
        return
    state, local = module.apt_state, calls.local
    _check(module, state, names, args, kwargs)
    if all(name == BASE for name in names):
        with calls.disabling(state.token):
            yield
        return
    outer = local.rows
    single = not state.others and all(name == state.adapter for name in names)
    rows = None if single else Rows(state, tuple(names), generating)
    try:
        local.rows = rows
        yield
    finally:
        local.rows = outer


def _in_groups(model, generate_batch: Callable, inputs, names, args, kwargs) -> dict[str, Any]:
    """`generate_batch` for the requests of each adapter in turn, since requests in one batch share one row.

    The results are in the order of the requests, with the ids that one call gives them.
    """
    state, local, outer = model.apt_state, calls.local, calls.local.rows
    _check(model, state, names, (), {})
    if len(names) != len(inputs):
        given = f"adapter_names has {counted(len(names), 'name')}"
        raise ConfigError(f"{given}; generate_batch has {counted(len(inputs), 'request')}")
    if kwargs.get("persistent_manager"):
        raise PatchError("persistent_manager=True keeps the cache of one adapter; pass it without adapter_names")
    found: dict[int, list[Any]] = {}
    for name in dict.fromkeys(names):
        numbers = [number for number, own in enumerate(names) if own == name]
        with calls.disabling(state.token) if name == BASE else nullcontext():
            try:
                local.rows = None if name == BASE else Rows(state, (name,), generating=True)
                results = generate_batch([inputs[number] for number in numbers], *args, **kwargs)
            finally:
                local.rows = outer
        ids = list(dict.fromkeys(each.partition("__")[0] for each in results))
        if len(ids) != len(numbers):
            raise PatchError(
                f"generate_batch returned {len(ids)} of the {len(numbers)} requests of adapter {name!r}; see its log"
            )
        for each, result in results.items():
            own_id, *child = each.partition("__")
            number = numbers[ids.index(own_id)]
            result.request_id = "".join((f"req_{number}", *child))
            found.setdefault(number, []).append(result)
    return {result.request_id: result for number in sorted(found) for result in found[number]}


def _check(module, state, names, args, kwargs) -> None:
    """Raise an error for names that are wrong, or that the call could not follow."""
    if torch.compiler.is_compiling():
        raise PatchError("adapter_names is given inside torch.compile; call the model as it was before it was compiled")
    if module.apt_replica:
        raise PatchError("adapter_names is given to a replica of nn.DataParallel, which does not divide the names")
    if state.disabled:
        raise PatchError("adapter_names is given while the prefix is disabled, which would ignore it")
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(f"adapter_names is {names!r}; it needs a list with one adapter's name for each row")
    known = [state.adapter, *state.parked, BASE]
    for name in names:
        if name not in known:
            raise ConfigError(f"adapter_names has {name!r}; the model has {', '.join(map(repr, known))}")
    batch = _batch(args, kwargs)
    if batch is not None and batch != len(names):
        raise ConfigError(f"adapter_names has {counted(len(names), 'name')}; the batch has {counted(batch, 'row')}")
    senses = {site.senses for site in state.sites}
    if len(senses) > 1 and any("text" in each for each in senses):
        raise PatchError(
            f"adapter_names is given to {type(module).__name__}, which has parts for {len(senses)} kinds of inputs, "
            "whose rows are not those of the batch; use one adapter for a batch"
        )
    _refuse_heads(module, state, names)


def _batch(args, kwargs) -> int | None:
    given = [kwargs.get(name) for name in _INPUTS] + list(args[:1])
    return next((len(each) for each in given if isinstance(each, Tensor) and each.ndim), None)


def _refuse_heads(module, state, names) -> None:
    """Raise `PatchError` if the rows need different values of what trains beside the prefixes, such as a task head."""
    within = {id(parameter) for parameter in module.parameters()}
    parameters = state.parameters
    for name in dict.fromkeys(names):
        if name == state.adapter:
            continue
        own = {} if name == BASE else state.parked[name].values
        for each, start in state.start.items():
            now, value = parameters.get(each), own.get(each, start)
            if now is None or id(now) not in within or "meta" in (now.device.type, value.device.type):
                continue
            if not same_values(now, value):
                raise PatchError(
                    f"adapter_names has {name!r} and the active adapter is {state.adapter!r}, whose values of {each} "
                    "differ; a batch has one task head. Run the rows of each adapter alone, after set_adapter"
                )


def _refuse_names_of_peft(module: nn.Module) -> None:
    """Raise `PatchError` if PEFT's model around this one was given ``adapter_names``, which it does not pass on.

    Its layers then have a hook with the names for the time of the call.
    """
    layer = next((m for m in module.modules() if hasattr(m, "base_layer") and hasattr(m, "active_adapters")), None)
    hooks = () if layer is None else layer._forward_pre_hooks.values()
    if any(isinstance(hook, functools.partial) and hook.keywords.get("adapter_names") for hook in hooks):
        raise PatchError(
            "adapter_names is given to PEFT's model, which chooses its own adapters by it and would leave all rows "
            "with the active prefix; run the rows of each adapter alone, after set_adapter"
        )


def install(state) -> None:
    """Let the patched model and its body take ``adapter_names``."""
    for module in _callers(state.model):
        module.apt_state = state
        subclass.add(module, _kind(module))


def remove(model) -> None:
    """Undo `install`."""
    for module in _callers(model):
        subclass.remove(module, _kind(module))
        module.__dict__.pop("apt_state", None)


def _callers(model) -> list[Any]:
    return list(dict.fromkeys((model, getattr(model, "base_model", model))))


def _kind(module) -> type:
    return GeneratesByRow if hasattr(subclass.parts(type(module))[0], "generate") else ByRow
