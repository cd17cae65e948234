"""The imports between the package's modules, read from their source, and the allowed layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import apt_kernels
from apt_kernels.ops import choose

PACKAGE = apt_kernels.__name__

# The parts that each part may import beside itself. A module belongs to the longest part that prefixes its name.
LAYERS = {
    "errors": (),
    "mask": ("errors",),
    "patterns": ("errors",),
    "wrapping": (),
    "transforms": (),
    "config": ("errors", "prefix"),
    "impl": ("errors", "mask"),
    "ops": ("errors", "mask", "transforms", "impl"),
    "onnx": ("errors", "ops", "impl"),
    "prefix": ("errors", "transforms"),
    "hf": ("errors", "mask", "patterns", "wrapping", "config", "ops", "prefix"),
    "serving": ("errors", "config", "prefix", "hf"),
    "__main__": ("errors", "ops", "hf"),
}
# The same inside hf: a part may import those in earlier lines, and others in its own line.
HF_LAYERS = (
    ("calls", "compat", "site", "events"),
    ("state", "weights", "offload", "hub", "plot", "untrusted", "adapter_file", "model_card", "text"),
    ("attention",),
    ("discovery", "trainable", "transaction", "base_record", "capture", "precision", "vocabulary", "optimizer"),
    ("unsaved",),
    ("patching", "batches"),
    ("adapters", "pruning", "toggle", "summary", "reference"),
    ("checkpoint", "probing", "initialise", "folding", "composing", "export"),
    ("integrations", "commands", "harness"),
    ("",),  # hf/__init__.py
)
# Folders or modules of impl that implement the op: none may import another. The rest of impl is what they share.
IMPLEMENTATIONS = tuple(choose.names())
# Packages that only this part may import.
ONLY_FOR = {
    "hf": ("transformers", "peft", "huggingface_hub", "safetensors", "accelerate", "deepspeed", "lm_eval"),
    "impl.triton": ("triton",),
    "serving.vllm": ("vllm",),
}


def sources() -> dict[str, str]:
    """The source of every module of the package, by its full name; a folder's `__init__` has the folder's name."""
    root = Path(apt_kernels.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join((PACKAGE, *parts))] = path.read_text()
    return found


def imports(name: str, source: str, modules: set[str]) -> Iterator[str]:
    """Every name that the module imports, anywhere in its source; names of this package are resolved to modules."""
    is_folder = any(other.startswith(f"{name}.") for other in modules)

    def around(level: int) -> list[str]:
        return name.split(".")[: len(name.split(".")) - level + is_folder]

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (_module(alias.name, modules) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*around(node.level), *filter(None, [node.module])])
            yield from (_module(f"{base}.{alias.name}", modules) for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # import_module, __import__
            for given in (part.value for part in node.args if isinstance(part, ast.Constant)):
                if isinstance(given, str):
                    level = len(given) - len(given.lstrip("."))
                    base = around(level) if level else []
                    yield _module(".".join([*base, given.lstrip(".")]), modules)


def _module(name: str, modules: set[str]) -> str:
    """The module of this package that ``name`` is or belongs to; ``name`` itself for other packages."""
    while name not in modules and name.startswith(f"{PACKAGE}."):
        name = name.rpartition(".")[0]
    return name


def graph(given: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules of this package that it imports. The package's own `__init__` is left out."""
    modules = set(given)
    ours = {name: {to for to in imports(name, given[name], modules) if to in modules} for name in given}
    return {name: found - {name, PACKAGE} for name, found in ours.items() if name != PACKAGE}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports, each once."""
    found, done = {}, set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circle = path[path.index(name) :]
            found.setdefault(frozenset(circle), [*circle, name])
        elif name not in done:
            for to in sorted(edges[name]):
                visit(to, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return list(found.values())


def wrong_arrows(edges: dict[str, set[str]]) -> list[str]:
    """Imports against the layers, as ``a -> b``, and modules that have no layer."""
    found = [f"{name} has no layer" for name in edges if not _allowed_from(name)]
    for name, targets in edges.items():
        allowed = _allowed_from(name)
        found += [f"{name} -> {to}" for to in sorted(targets) if allowed and not allowed(_own(to))]
    return sorted(found)


def _own(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")


def _allowed_from(module: str):
    """Whether a module may import another, by their names in the package; None: it has no layer."""
    head, _, rest = _own(module).partition(".")
    if head not in LAYERS:
        return None
    line = _line(rest) if head == "hf" else 0
    if line is None:
        return None

    def allowed(target: str) -> bool:
        to, _, inside = target.partition(".")
        if to != head:
            return to in LAYERS[head]
        if head == "hf":
            below = _line(inside)
            return below is not None and below <= line
        if head == "impl":
            mine, theirs = rest.split(".")[0], inside.split(".")[0]
            return theirs == mine or theirs not in IMPLEMENTATIONS
        return True

    return allowed


def _line(rest: str) -> int | None:
    part = rest.split(".")[0]
    return next((i for i, parts in enumerate(HF_LAYERS) if part in parts), None)


def wrong_packages(given: dict[str, str]) -> list[str]:
    """Imports of other packages that only another part may import."""
    found = set()
    for name, source in given.items():
        for to in imports(name, source, set(given)):
            for part, packages in ONLY_FOR.items():
                if to.split(".")[0] in packages and not f"{_own(name)}.".startswith(f"{part}."):
                    found.add(f"{name} -> {to.split('.')[0]}")
    return sorted(found)
