"""Save and load what was trained: ``adapter.safetensors`` and ``apt_config.json``, nothing else, nothing pickled."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import AptConfig
from ..errors import AdapterError, ConfigError, PatchError
from . import events, hub, offload, weights
from .patching import patch
from .state import Model, inner, is_patched, named_parameters, prefixes, state_of
from .transaction import atomic

WEIGHTS = "adapter.safetensors"
CONFIG = "apt_config.json"


def save(
    model: nn.Module,
    folder: str | os.PathLike | None = None,
    *,
    repo_id: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write the trained weights of a patched model (prefixes, and every other trainable parameter).

    A reparameterised prefix is written as the key and value that it gives; the model keeps its MLP.

    Both files are written beside their places and then moved there, so that a crash leaves the old ones whole.

    Where processes share the weights, each of them has to call this, with a folder of its own or the same one.

    Args:
        model: a patched model.
        folder: where to write; it is made if need be. May be left out where ``repo_id`` is given.
        repo_id: a repository of the Hugging Face hub, ``owner/name``, to upload the two files to; it is made if need
            be, ``private`` or not, and gets one commit. Of several processes the first uploads.
        private, commit_message: of the repository, and of the commit.
        state_dict: the weights to take in place of the model's own, by the model's names: those gathered from shards.

    Raises:
        PatchError: the model is not patched.
        AdapterError: ``state_dict`` lacks a trained weight, the hub refuses the upload, or other processes that hold
            parts of the weights have not called this within ten minutes.
    """
    if folder is None and repo_id is None:
        raise AdapterError("folder and repo_id are None; save needs one of them")
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        _write(model, Path(place), state_dict)
        if repo_id is not None and _is_first_process():
            hub.publish(Path(place), [WEIGHTS, CONFIG], repo_id, private, commit_message)


def _is_first_process() -> bool:
    return (
        not torch.distributed.is_available()
        or not torch.distributed.is_initialized()
        or not torch.distributed.get_rank()
    )


def _write(model, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    state = state_of(model)
    tensors = _folded(model, trained_weights(model) if state_dict is None else _given(model, state_dict))
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {name: prefix.length for name, prefix in prefixes(model).items()}
    config = {**state.config.to_json(), "model": type(inner(model)).__name__, "lengths": lengths}
    config["reparameterisation"] = None  # folded away
    del config["implementation"]  # a choice of this machine, not of the adapter
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"))


def trained_weights(model) -> dict[str, Tensor]:
    """Copies of the trained weights on the CPU, by name, gathered: each process that holds a part has to call this."""
    trained = _trained(model)
    weights.meet(model, trained.values())
    with weights.gathered(model, trained.values()):
        base = inner(model)
        return {name: whole(offload.read(base, name, tensor)) for name, tensor in trained.items()}


def weights_to_write(model, is_main_process: bool, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """What `save` is to take on this process, as transformers' ``save_pretrained`` is called; None: nothing to write.

    Processes that do not write take part in the gathering where all are to call (FSDP2, tensor parallel).
    """
    if state_dict is None and (is_main_process or weights.distributes(inner(model))):
        state_dict = trained_weights(model)
    return state_dict if is_main_process else None


def _given(model, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights out of ``state_dict``."""
    names = list(_trained(model))
    for name in names:
        if name not in state_dict:
            raise AdapterError(f"state_dict lacks {name}, which was trained")
    return {name: whole(state_dict[name]) for name in names}


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; a distributed tensor (FSDP2, tensor parallel) is gathered, and every process has to call."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().to("cpu", copy=True).contiguous()


def _replace(path: Path, write) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _trained(model) -> dict[str, Tensor]:
    """Prefix parameters, frozen by the user or not, and all that is trainable beside them, by parameter name.

    What PEFT added to the model is PEFT's to save.
    """
    ours = {id(parameter) for prefix in prefixes(model).values() for parameter in prefix.parameters()}
    theirs, parameters = events.added_parameters(inner(model)), named_parameters(model)
    return {n: p for n, p in parameters.items() if id(p) in ours or (p.requires_grad and id(p) not in theirs)}


def save_unfolded(model, path: Path, state_dict: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Write the trained weights and ``others``, reparameterisations as they are, for training to be resumed."""
    tensors = {**_given(model, state_dict), **others}
    _replace(path, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


@torch.no_grad()
def _folded(model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, with the key and value of reparameterised prefixes in the place of what makes them."""
    for name, prefix in prefixes(model).items():
        if prefix.mlp is None:
            continue
        start = f"{name}.apt.mlp."
        made = {n.removeprefix(start): tensor for n, tensor in tensors.items() if n.startswith(start)}
        tensors = {n: tensor for n, tensor in tensors.items() if not n.startswith(start)}
        for field, tensor in zip(("key", "value"), torch.func.functional_call(prefix.mlp, made)):
            tensors[f"{name}.apt.{field}"] = tensor.contiguous()
    return tensors


@atomic
def load(
    model: Model,
    folder: str | os.PathLike,
    *,
    revision: str | None = None,
    example_inputs: dict | None = None,
) -> Model:
    """Load what `save` wrote into ``model``, patching it first if it is not; the weights keep the model's dtypes.

    Everything is checked before anything changes: on an error the model is as it was.

    Args:
        model: a transformers model, patched or not.
        folder: where `save` wrote, or a repository of the Hugging Face hub, ``owner/name``; a folder of that name goes
            first.
        revision: a branch, tag or commit of the repository.
        example_inputs: as for `patch`.

    Returns:
        The same model.

    Raises:
        AdapterError: a file is missing, damaged, of a newer format, or its first mismatching weight is named.
        PatchError: the model cannot be patched, or is patched with other settings.
    """
    folder = hub.fetch(folder, [WEIGHTS, CONFIG], revision) if hub.is_repository(folder) else Path(folder)
    config = read_config(folder / CONFIG)
    events.check("load", model)
    fresh = not is_patched(model)
    if not fresh and _shape_of(state_of(model).config) != _shape_of(config):
        raise PatchError("the model is already patched with other settings; call apt_kernels.unpatch(model) first")
    if fresh:
        try:
            patch(model, config, example_inputs=example_inputs)
        except ConfigError as error:
            raise AdapterError(f"{folder} does not fit the {type(inner(model)).__name__}: {error}") from error
    tensors = _read_weights(folder / WEIGHTS)
    targets, trained = named_parameters(model), _trained(model)
    with weights.gathered(model, trained.values(), changed=True), torch.no_grad():
        _check(tensors, targets, trained, folder)
        for name, tensor in tensors.items():
            offload.write(inner(model), name, targets[name], weights.placed_like(targets[name], tensor))
    events.changed("load", state_of(model))
    return model


def _shape_of(config: AptConfig) -> tuple:
    """The settings on which the set of weights and their meaning depend."""
    return config.prefix_length, config.gate, config.layer_scale, config.reparameterisation, config.layers


def read_config(path: Path) -> AptConfig:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}; it is not an adapter folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name not in ("model", "lengths")}
    try:
        return AptConfig.from_json(data)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors handle)
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}; it is not an adapter folder") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error


def _check(tensors: dict, targets: dict, needed: dict, folder: Path) -> None:
    for name, tensor in tensors.items():
        if name not in targets:
            raise AdapterError(f"{folder} holds {name}, which the model does not have")
        if tensor.shape != targets[name].shape:
            raise AdapterError(f"{folder}: {name} is {list(tensor.shape)}; the model's is {list(targets[name].shape)}")
        if tensor.is_floating_point() != targets[name].is_floating_point():
            raise AdapterError(f"{folder}: {name} is {tensor.dtype}; the model's is {targets[name].dtype}")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise AdapterError(f"{folder} lacks {missing[0]}, which the model needs")
