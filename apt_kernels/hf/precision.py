"""Trainable parameters of a half-precision base model: float32 copies, cast to the base's dtype in a forward.

A step of 2e-5 is less than the spacing of most bfloat16 weights, and `torch.amp.GradScaler` refuses float16 gradients.
`patch` therefore replaces each half-precision parameter that trains by a float32 copy. Within a forward of its module,
or of a module that contains that one, reading the attribute gives the copy cast to the base's dtype. The outputs before
the first step therefore equal the base's bit for bit, and the gradient is float32. Outside of a forward the copy is an
ordinary parameter.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import its_type
from . import calls, offload
from .attention import subclass
from .state import Original

_HALF = (torch.float16, torch.bfloat16)


class Widened(subclass.Mixin):
    """Mixin for a module that holds float32 copies, and for the modules that contain it.

    ``apt_dtypes``: the base's dtype by the name of the parameter; ``model.to(dtype)`` changes it.
    """

    # A default on the class, because a class that FSDP2 derived from this one remains after `put_back`.
    apt_dtypes: Mapping[str, torch.dtype] = types.MappingProxyType({})

    def __getattr__(self, name):
        found = super().__getattr__(name)
        if calls.local.narrowing and isinstance(found, Tensor):
            dtype = self.apt_dtypes.get(name)
            return found if dtype is None else found.to(dtype)
        return found

    def forward(self, *args, **kwargs):
        local = calls.local
        before = local.narrowing
        try:
            local.narrowing = True
            for name in self.apt_dtypes:
                if name not in self._parameters:
                    return _with_plain_tensors(self, super().forward, args, kwargs)
            return super().forward(*args, **kwargs)
        finally:
            local.narrowing = before

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        if "apt_dtypes" in self.__dict__:
            as_cast = {name: fn(torch.empty(0, dtype=dtype, device="cpu")) for name, dtype in self.apt_dtypes.items()}
            self.__dict__["apt_dtypes"] = {name: tensor.dtype for name, tensor in as_cast.items()}
        return result


def _with_plain_tensors(module, forward, args, kwargs):
    """Run ``forward`` where parameters are plain attributes: in `nn.DataParallel`'s replicas and in FSDP1."""
    held = {name: module.__dict__[name] for name in module.apt_dtypes if name in module.__dict__}
    try:
        module.__dict__.update({name: tensor.to(module.apt_dtypes[name]) for name, tensor in held.items()})
        return forward(*args, **kwargs)
    finally:
        module.__dict__.update(held)


def widen(model: nn.Module, names: Iterable[str], keep: bool = False) -> list[Original]:
    """Replace the half-precision parameters ``names`` by float32 copies, in every module that shares them.

    ``keep``: `put_back` keeps what the copies learned, rounded.

    ZeRO-3 has float32 copies of its own, so its parameters are not replaced.
    """
    copies = {}
    for parameter in map(model.get_parameter, sorted(names)):
        if parameter.dtype in _HALF and not hasattr(parameter, "ds_id"):
            copy = nn.Parameter(parameter.detach().to(torch.float32), requires_grad=parameter.requires_grad)
            copy.__dict__.update(parameter.__dict__)
            copies[id(parameter)] = parameter, copy
    done: list[Original] = []
    for module in model.modules() if copies else ():
        ours = {key: copies[id(p)] for key, p in module._parameters.items() if id(p) in copies}
        if ours and isinstance(module, nn.RNNBase):  # its forward reads its own list of weights
            dtype = next(iter(ours.values()))[0].dtype
            warnings.warn(f"{its_type(module)} trains in {dtype}: it cannot hold float32 copies", stacklevel=6)
            continue
        for key, (original, copy) in ours.items():
            done.append(Original(module, key, original, keep))
            module._parameters[key] = copy
            dtypes = module.__dict__.get("apt_dtypes", {})
            module.__dict__["apt_dtypes"] = {**dtypes, key: original.dtype}
    if done:
        _mark(model)
    return done


def _mark(model: nn.Module) -> None:
    """Make exactly the modules that hold copies, and those that contain them, `Widened`."""
    around = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if module.__dict__.get("apt_dtypes"):
            parts = name.split(".") if name else []
            around |= {model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)}
    for module in model.modules():
        if module in around:
            module.__dict__.setdefault("apt_dtypes", {})
            subclass.add(module, Widened)
        elif "apt_dtypes" in module.__dict__:
            _unmark(module)


def _unmark(module: nn.Module) -> None:
    del module.__dict__["apt_dtypes"]
    subclass.remove(module, Widened)


def put_back(model: nn.Module, originals: list[Original]) -> None:
    """Undo `widen`: restore each original, on the device and in the dtype that the model has now.

    Parameters that FSDP2 has sharded remain float32 copies.
    """
    names = {module: name for name, module in model.named_modules()}
    for module, key, original, keep in originals:
        now = module._parameters.get(key)
        if hasattr(now, "device_mesh") and not hasattr(original, "device_mesh"):
            continue
        dtypes = dict(module.__dict__["apt_dtypes"])
        dtype = dtypes.pop(key)
        if now is not None and now.shape == original.shape:
            held = now.device.type == "meta" and module in names
            holder = offload.holder(model, f"{names[module]}.{key}") if held else None
            if keep:
                module._parameters[key] = nn.Parameter(now.detach().to(dtype), requires_grad=now.requires_grad)
            else:
                module._parameters[key] = _moved(original, now, dtype)
            if holder is not None and not keep:
                place, at = holder.place()
                place[at] = original.detach().to(holder.read().device, dtype, copy=True)
        module.__dict__["apt_dtypes"] = dtypes
        if not dtypes and module not in names:
            _unmark(module)  # the module was replaced since
    if originals:
        _mark(model)


def _moved(original: nn.Parameter, now: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """``original``, or a copy of it if the model is now on another device or in another dtype."""
    if original.device == now.device and original.dtype == dtype:
        return original
    value = now if original.device.type == "meta" else original
    return nn.Parameter(value.detach().to(now.device, dtype), requires_grad=original.requires_grad)
