"""One training with transformers' Trainer: best epoch on the development set, checkpoints of what is trained."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.quality import methods

from .methods import Settings
from .models import fresh_model, load_tokenizer, logits_of, loss_of
from .sources import Row
from .tasks import Collator, Task, encode, score, subset

_WEIGHTS = "trained.safetensors"


@dataclass
class Encoded:
    """One split, ready for the collator, with its rows for scoring."""

    rows: list[Row]
    features: list[dict]


@dataclass
class Trained:
    """The model at its best epoch, what it was trained on, and the record that is kept."""

    model: nn.Module
    task: Task
    collator: Collator
    dev: Encoded
    record: dict


class TaskTrainer(transformers.Trainer):
    """A Trainer for every kind of task, whose checkpoints hold the trained weights alone."""

    def __init__(self, task: Task, method: str, settings: Settings, **options):
        self.task, self.method, self.settings = task, method, settings
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = methods.optimizer(self.model, self.method, self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            epoch = max(1, num_training_steps // int(self.args.num_train_epochs))
            decays = {"linear": lambda step: max(0.0, 1 - step / num_training_steps)}
            decays["exponential"] = lambda step: 0.95 ** (step // epoch)
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decays[self.settings.schedule])
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = logits_of(model, inputs, self.task)
        loss = loss_of(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trained(self.model), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _restore(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self):
        _restore(self.model, Path(self.state.best_model_checkpoint))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _restore(model: nn.Module, folder: Path) -> None:
    saved, targets = load_file(folder / _WEIGHTS), dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in saved.items():
            targets[name].copy_(tensor)


class _Report(transformers.TrainerCallback):
    def __init__(self, notify: Callable[[int, float], None]):
        self.notify = notify

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.epoch:
            self.notify(round(state.epoch), metrics["eval_score"])


def run(
    task: Task, method: str, settings: Settings, seed: int, folder: Path | None, notify: Callable[[int, float], None]
) -> Trained:
    """Train with one seed; a checkpoint in ``folder`` is resumed. None: there is none, and nothing is kept.

    The record's ``dev`` is the best epoch's score on the development set, ``test`` the test score of that same epoch,
    ``last`` the development score of the last epoch.
    """
    began = time.perf_counter()
    tokenizer = load_tokenizer(settings.model, task)
    encoded = _splits(task, settings, seed, tokenizer)
    model = methods.prepare(fresh_model(task, settings, tokenizer, seed), method, settings, seed)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) if folder is None else folder
        trainer = _trainer(model, task, method, settings, seed, encoded, Collator(tokenizer), output, notify)
        trainer.args.save_only_model = folder is None
        last = transformers.trainer_utils.get_last_checkpoint(output) if output.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        # Trained epochs only: the curve, the best of it, and the same epoch's test score.
        curve = [entry["eval_score"] for entry in trainer.state.log_history if "eval_score" in entry]
        test = _score(trainer, task, encoded["test"]) if encoded["test"].rows else None
    best = max(range(len(curve)), key=curve.__getitem__)
    record = {
        "dev": curve[best],
        "test": test,
        "last": curve[-1],
        "best_epoch": best + 1,
        "curve": curve,
        "examples": {part: len(split.rows) for part, split in encoded.items()},
        "parameters": methods.counts(model),
        "seconds": round(time.perf_counter() - began, 2),
    }
    return Trained(model, task, Collator(tokenizer), encoded["dev"], record)


def _splits(task: Task, settings: Settings, seed: int, tokenizer) -> dict[str, Encoded]:
    train, dev, test = task.splits.train, task.splits.dev, task.splits.test
    if settings.hold_out:
        # The epoch is chosen on rows held out of the training set, the development set is the test.
        train = random.Random(0).sample(train, len(train))
        train, dev, test = train[: -settings.hold_out], train[-settings.hold_out :], dev
    train = subset(task, train, settings.train_examples, seed)
    rows = {"train": train, "dev": dev[: settings.dev_examples], "test": test[: settings.test_examples]}
    return {part: Encoded(r, encode(task, r, tokenizer, settings.max_length)) for part, r in rows.items()}


def _trainer(model, task, method, settings, seed, encoded, collator, output, notify) -> TaskTrainer:
    dev = encoded["dev"]
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        seed=seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        max_grad_norm=1.0,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        logging_strategy="no",
    )
    trainer = TaskTrainer(
        task,
        method,
        settings,
        model=model,
        args=arguments,
        train_dataset=encoded["train"].features,
        eval_dataset=dev.features,
        data_collator=collator,
        compute_metrics=lambda p: {"score": score(task, p.predictions, p.label_ids, dev.rows, dev.features)},
        callbacks=[_Report(notify)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _score(trainer: TaskTrainer, task: Task, split: Encoded) -> float:
    trainer.compute_metrics = None
    found = trainer.predict(split.features)
    return score(task, found.predictions, found.label_ids, split.rows, split.features)
