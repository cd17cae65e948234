"""Models that are wrapped for distributed training: changes of the prefixes that have to be refused."""

from __future__ import annotations

import sys

from torch import nn

from ...errors import PatchError
from .. import events
from ..state import is_patched, prefixes
from ..weights import fsdp1, is_zero3_half


class Distributed(events.Integration):
    """DataParallel, DistributedDataParallel, FullyShardedDataParallel, FSDP2, DeepSpeed and tensor parallelism."""

    def inside(self, model):
        return model.module if isinstance(model, (nn.DataParallel, *_wrappers())) else None

    def check(self, action: events.Action, model) -> None:
        if action == "unpatch":
            _refuse_to_undo(model)
        elif action in ("patch", "add", "set", "prune"):
            _refuse_wrapped(model)
        if action == "prune":
            _refuse_spread(model)
        if action == "load":
            _refuse_trained_copies(model)


def _refuse_wrapped(model) -> None:
    """Raise `PatchError` if a wrapper of ``model`` has fixed its list of parameters."""
    for module in model.modules():
        if isinstance(module, _fixing_parameters()):
            name = type(module).__name__
            raise PatchError(
                f"the model is already wrapped for training on several processes ({name}), which would leave the "
                "prefixes out of it: their gradients would differ between the processes. Call apt_kernels.patch (and "
                "add_adapter, set_adapter, prune) before"
            )


def _refuse_to_undo(model) -> None:
    """Raise `PatchError` if a wrapper would continue with the parameters of the patched model."""
    for module in model.modules():
        if isinstance(module, _wrappers()):
            raise PatchError(
                f"{type(module).__name__} has fixed which parameters it synchronises between the processes: the base "
                "model's, which would train again, are not among them. Pass the model inside, before it is wrapped"
            )


def _refuse_spread(model) -> None:
    """Raise `PatchError` if the model's prefixes are sharded over processes."""
    found = prefixes(model) if is_patched(model) else {}
    spread = [name for name, prefix in found.items() if prefix.mesh is not None]
    if spread:
        raise PatchError(
            f"tensor parallelism spreads the prefix of {spread[0]} over processes; save the adapter, and call "
            "apt_kernels.prune on a model that one process holds, before it is sharded"
        )


def _refuse_trained_copies(model) -> None:
    """Raise `PatchError` if DeepSpeed trains float32 copies of the prefixes, which would overwrite what is loaded."""
    found = prefixes(model) if is_patched(model) else {}
    if any(is_zero3_half(parameter) for prefix in found.values() for parameter in prefix.parameters()):
        raise PatchError(
            "DeepSpeed trains float32 copies of the prefixes, and its next step would overwrite what is loaded; call "
            "apt_kernels.load before deepspeed.initialize"
        )


def _fixing_parameters() -> tuple[type, ...]:
    module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return (*_wrappers(), *([] if module is None else [module]))


def _wrappers() -> tuple[type, ...]:
    return (nn.parallel.DistributedDataParallel, *fsdp1(), *_engines())


def _engines() -> tuple[type, ...]:
    """DeepSpeed's wrapper; none where DeepSpeed was never imported."""
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return () if engine is None else (engine,)
