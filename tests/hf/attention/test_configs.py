"""The configs of a patched model: what transformers and PEFT do with one."""

from __future__ import annotations

import copy
import pickle

import pytest

import apt_kernels
from helpers import models


@pytest.fixture(params=["bert", "llama", "t5"])
def config(request):
    return apt_kernels.patch(models.build(request.param), prefix_length=2).config


def test_it_is_written_as_before_the_patch(config):
    model = models.build(config.model_type)
    assert config.to_json_string() == model.config.to_json_string()
    assert config.to_dict() == model.config.to_dict()


def test_another_one_of_its_class_is_a_plain_config(config):
    made = type(config)()
    assert made._attn_implementation is None or made._attn_implementation != "apt_kernels"
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_is_equal(config, copied):
    assert copied(config) == config
    assert copied(config).to_dict() == config.to_dict()


def test_it_is_read_back_from_a_folder(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
