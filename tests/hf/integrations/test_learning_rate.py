"""Trainer warns where the optimizer that it makes would not train the prefix, and is silent otherwise."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

import apt_kernels
from helpers import models


def warned(tmp_path, learning_rate=None, optimizer=False, patched=True) -> list[str]:
    torch.manual_seed(0)
    model = models.build("bert")
    if patched:
        apt_kernels.patch(model, prefix_length=4)
    settings = {} if learning_rate is None else {"learning_rate": learning_rate}
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, **settings)
    given = torch.optim.AdamW(apt_kernels.parameter_groups(model)) if optimizer else None
    trainer = Trainer(model, arguments, optimizers=(given, None))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.create_optimizer()
    return [str(each.message) for each in found if "learning rate" in str(each.message)]


def test_an_optimizer_that_was_made_before_the_patch_is_named(tmp_path):
    model = models.build("bert")
    given = torch.optim.AdamW(model.parameters())
    apt_kernels.patch(model, prefix_length=4)
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    with pytest.warns(UserWarning, match=r"has no parameter of the adapter 'default'.*Create it after patch"):
        Trainer(model, arguments, optimizers=(given, None)).create_optimizer()


def test_the_default_rate_is_named_with_what_to_do(tmp_path):
    (message,) = warned(tmp_path)
    for part in ("'default' is 5e-05", "parameter_groups(model)", "learning_rate=0.01"):
        assert part in message


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": True}, {"learning_rate": 1e-2}, {"learning_rate": 1e-4}, {"patched": False}],
    ids=["parameter_groups", "1e-2", "the lowest published", "not patched"],
)
def test_no_warning_where_the_prefix_trains(settings, tmp_path):
    assert not warned(tmp_path, **settings)
