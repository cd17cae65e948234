"""The attention modules that have a prefix are still in the model: checked before each of its forwards."""

from __future__ import annotations

from torch import nn

from ..state import moved


class Places:
    """Where the attention modules of ``model`` that have a prefix are."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = {name: module for name, module in model.named_modules() if _has_prefix(module)}
        self.steps = _steps(model, list(self.modules))

    def check(self) -> None:
        """Raise `PatchError` where another module without a prefix has taken the place of one with a prefix."""
        for parent, name, child in self.steps:
            if parent._modules.get(name) is not child:
                self._find_again()
                return

    def _find_again(self) -> None:
        """A module may have been wrapped since, by activation checkpointing or compilation, or its layer removed."""
        now = dict(self.model.named_modules())
        names = {id(module): name for name, module in now.items()}
        for name, module in self.modules.items():
            there = now.get(name)
            if id(module) not in names and there is not None and not any(map(_has_prefix, there.modules())):
                raise moved(name, "has no prefix any more: it was replaced")
        self.steps = _steps(self.model, [names[id(m)] for m in self.modules.values() if id(m) in names])


def _has_prefix(module: nn.Module) -> bool:
    """Whether an attention module has a prefix of an active adapter."""
    return "apt" in module._modules or "apt_others" in module._modules


def _steps(model: nn.Module, names: list[str]) -> list[tuple[nn.Module, str, nn.Module]]:
    """On the way from ``model`` to each module: a module, the name of one inside it, and that one."""
    found: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    for name in names:
        here = model
        for part in name.split("."):
            inside = here._modules[part]
            assert inside is not None
            found[id(here), part] = here, part, inside
            here = inside
    return list(found.values())
