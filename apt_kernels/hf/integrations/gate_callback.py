"""`GateCallback`: Trainer logs the gates while it trains, and leaves their picture at the end."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ...errors import ArgumentError, its_type
from .. import offload
from ..probing import Probe, probe
from ..state import inner, state_of

logger = logging.getLogger(__name__)


class GateCallback(TrainerCallback):
    """A callback for transformers' Trainer that logs the gates of a patched model while it trains.

    It runs `probe` before the first step, each time Trainer logs the loss, and at the end. For each attention module it
    logs ``gates/MODULE/layer_scale`` (lambda), ``gates/MODULE/gate_mean`` (over prefix tokens and examples),
    ``gates/MODULE/gate_std_tokens`` and ``gates/MODULE/gate_std_examples`` (the spread over the tokens of an example
    and over examples) to everything that Trainer reports to. At the end it writes the picture of `Probe.picture`; if
    that fails, for instance without matplotlib, it logs a warning. Training computes the same weights as without it.

    Args:
        trainer: the Trainer, or a subclass, whose model is patched.
        batches: dicts of keyword arguments of the forward, as for `probe`. None: the first ``examples`` rows of the
            Trainer's evaluation data, or of its training data if it has none.
        every: measure after each of so many steps. None: whenever Trainer logs the loss.
        examples: the number of rows without ``batches``.
        picture: the image file, in the Trainer's output folder unless absolute. None: no picture.

    Attributes:
        probe: the last `Probe`; after training, of the model that remains.

    Raises:
        ArgumentError: an argument is wrong, or, before the first step, the model cannot run a batch.
        PatchError: the Trainer's model is not patched.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> data = [{"input_ids": batch["input_ids"][i], "labels": i} for i in (0, 1)]
        >>> settings = {"learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "report_to": "none"}
        >>> arguments = TrainingArguments("out", disable_tqdm=True, **settings)
        >>> trainer = Trainer(model, arguments, train_dataset=data)
        >>> trainer.add_callback(apt_kernels.GateCallback(trainer, [batch]))
        >>> result = trainer.train()
        >>> [entry["step"] for entry in trainer.state.log_history if any("gates/" in name for name in entry)]
        [0, 1, 2]
        >>> os.path.exists("out/gates.png")
        True
    """

    probe: Probe

    def __init__(
        self,
        trainer: Trainer,
        batches: Iterable[Mapping[str, Tensor]] | None = None,
        *,
        every: int | None = None,
        examples: int = 32,
        picture: str | os.PathLike | None = "gates.png",
    ):
        if not isinstance(trainer, Trainer):
            raise ArgumentError(f"trainer is {its_type(trainer)}; it needs a transformers Trainer")
        for name, value, rest in (("every", every, ", or None"), ("examples", examples, "")):
            if (value is not None or not rest) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name} is {value!r}; it needs an int of at least 1{rest}")
        if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, (Iterable, type(None))):
            raise ArgumentError(f"batches is {its_type(batches)}; it needs dicts of the forward's arguments, in a list")
        state_of(trainer.model)
        self._trainer, self._every, self._examples, self._picture = trainer, every, examples, picture
        self._given = list(batches) if isinstance(batches, Iterator) else batches
        self._batches: Iterable[Mapping[str, Tensor]] = ()
        self._logging, self._step = False, -1

    def on_train_begin(self, args, state, control, **kwargs):
        self._step = -1
        with self._random_numbers_kept():
            self._batches = self._own_batches() if self._given is None else self._given
        self._log()

    def on_log(self, args, state, control, logs=None, **kwargs):
        due = "loss" in (logs or {}) and self._every is None
        if not self._logging and state.global_step != self._step and (due or "train_runtime" in (logs or {})):
            self._log()

    def on_step_end(self, args, state, control, **kwargs):
        if self._every is not None and state.global_step % self._every == 0:
            due = control.should_log
            self._log()
            control.should_log = due  # an entry in the log resets it

    def on_train_end(self, args, state, control, **kwargs):
        self._measure()  # `load_best_model_at_end` loaded another checkpoint since
        self._batches = ()
        if self._picture is None or not state.is_world_process_zero:
            return
        path = Path(args.output_dir, self._picture)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.probe.picture(path)
        except (ModuleNotFoundError, OSError, ValueError) as error:
            logger.warning("no picture of the gates: %s", error)

    def _log(self) -> None:
        self._measure()
        values = {}
        for layer in self.probe.layers:
            values[f"gates/{layer.name}/layer_scale"] = layer.layer_scale
            for name in ("gate_mean", "gate_std_tokens", "gate_std_examples"):
                given = getattr(layer, name)
                values[f"gates/{layer.name}/{name}"] = sum(given) / len(given)
        self._step = self._trainer.state.global_step
        self._logging = True
        try:
            # A subclass's own `log` adds its metrics since the last entry, which are for that of the loss.
            Trainer.log(self._trainer, values)
        finally:
            self._logging = False

    def _measure(self) -> None:
        with self._random_numbers_kept():
            self.probe = probe(self._trainer.model_wrapped, self._batches, progress=False)

    def _own_batches(self) -> list[dict[str, Tensor]]:
        """The first rows of the Trainer's data, as its data loader collates them, without what the forward ignores."""
        trainer = self._trainer
        data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        data = next(iter(data.values())) if isinstance(data, Mapping) else data
        if isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__len__"):
            rows: Any = list(itertools.islice(iter(data), self._examples))
        else:
            rows = [data[i] for i in range(min(self._examples, len(data)))]
        found = list(trainer.get_test_dataloader(rows))
        if not found or not all(isinstance(batch, Mapping) for batch in found):
            what = f"batches of the type {type(found[0]).__name__}" if found else "no batch"
            raise ArgumentError(
                f"the Trainer's data loader gives {what}; give GateCallback batches: dicts of the forward's arguments"
            )
        known = inspect.signature(inner(trainer.model).forward).parameters
        named = {name for name, each in known.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
        return [{name: value for name, value in batch.items() if name in named} for batch in found]

    @contextmanager
    def _random_numbers_kept(self):
        """Python's, NumPy's and torch's generators continue after this context as if it had not been."""
        device, numpy = offload.device(state_of(self._trainer.model).model), sys.modules.get("numpy")
        before = random.getstate(), numpy and numpy.random.get_state()
        devices = [] if device.type in ("cpu", "meta") else [device]
        try:
            with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
                yield
        finally:
            random.setstate(before[0])
            if numpy:
                numpy.random.set_state(before[1])
