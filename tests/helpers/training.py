"""Small runs of transformers' Trainer."""

import torch
import transformers

import apt_kernels

from . import models


def head_of(family):
    return "AutoModelForSequenceClassification" if family in models.ENCODERS else None


def rows(family, count=24):
    made = []
    for seed in range(count):
        row = {name: tensor[0] for name, tensor in models.inputs(family, batch=1, seed=seed).items()}
        if family in models.SEQ2SEQ:
            row["labels"] = row.pop("decoder_input_ids")
        else:
            row["labels"] = row["input_ids"][0] % 2 if head_of(family) else row["input_ids"]
        made.append(row)
    return made


class Losses(transformers.TrainerCallback):
    def __init__(self):
        self.by_step = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.by_step[state.global_step] = logs["loss"]


def trainer(model, folder, family, steps=6, **options):
    losses = Losses()
    defaults = dict(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    args = transformers.TrainingArguments(**{**defaults, **options})
    data = rows(family)
    made = transformers.Trainer(model, args, train_dataset=data[:16], eval_dataset=data[16:], callbacks=[losses])
    return made, losses


def fresh(family, seed=0, **overrides):
    torch.manual_seed(0)
    return apt_kernels.patch(models.build(family, head_of(family), **overrides), prefix_length=4, init_seed=seed)
