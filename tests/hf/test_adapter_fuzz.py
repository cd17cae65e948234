"""Mutations of a good adapter, by a seed: each loads or ends in an `AdapterError`, soon, with the model untouched."""

import json
import os
import random
import shutil
import struct

import pytest
import torch

import apt_kernels
from apt_kernels.hf.adapter_file import CONFIG, WEIGHTS, open_adapter, write_adapter
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot
from helpers.processor_time import at_most

PARTS = 10
COUNT = (2000 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 200) // PARTS
VALUES = (
    None, True, -1, 0, 1, 3, 10**7, 10**18, 0.5, 1e308, "",
    "auto", "first", "none", "self", ".*", "(a|a)*$", "\\w+" * 40,
    "(", "x" * 10**5, [], [3, 3], [0, 0], [[3]], ["a"] * 10**4, {}, {"a": {}}, "é\n\x00", "NaN",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = apt_kernels.patch(models.build("bert"), prefix_length=3)
    randomise(model)
    apt_kernels.save(model, folder)
    return folder


def flip(folder, draw):
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)


def splice(folder, draw):
    path = folder / draw.choice([WEIGHTS, CONFIG])
    data = path.read_bytes()
    at, length = draw.randrange(len(data)), draw.choice([0, 1, 8, 100, 10**6])
    path.write_bytes(data[:at] + draw.choice([b"", draw.randbytes(draw.choice([1, 8, 50]))]) + data[at + length :])


def header(folder, draw):
    """Another header, of the right length; the data stay."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + length])
    name = draw.choice(sorted(found))
    change = draw.choice(["drop", "rename", "field", "value"])
    entry = found.pop(name)
    if change == "rename":
        found[draw.choice(["", "x" * 1000, "bert.pooler.weight", name + "."])] = entry
    elif change == "field":
        entry[draw.choice(sorted(entry))] = draw.choice(VALUES)
        found[name] = entry
    elif change == "value":
        found[name] = draw.choice(VALUES)
    text = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def settings(folder, draw):
    """Other settings, with the checksum that belongs to them."""
    with open_adapter(folder) as file:
        found, tensors = dict(file.settings), file.tensors()
    for _ in range(draw.choice([1, 1, 3])):
        found[draw.choice([*found, "colour"])] = draw.choice(VALUES)
    write_adapter(folder, tensors, found)


def tensors(folder, draw):
    """Other tensors, with the checksum that belongs to them."""
    with open_adapter(folder) as file:
        found, given = file.settings, file.tensors()
    name = draw.choice(sorted(given))
    change = draw.choice(["drop", "shape", "dtype", "value", "more"])
    tensor = given.pop(name)
    if change == "shape":
        given[name] = tensor.flatten()[: draw.randrange(4)]
    elif change == "dtype":
        given[name] = tensor.to(draw.choice([torch.float64, torch.float16, torch.bfloat16]))
    elif change == "value":
        given[name] = torch.full_like(tensor, draw.choice([float("nan"), float("inf"), 0.0]))
    elif change == "more":
        given[name] = tensor
        given[draw.choice(["cls.predictions.bias", "bert.pooler", "x"])] = torch.zeros(99)
    write_adapter(folder, given, found)


def copy(folder, draw):
    path = folder / CONFIG
    found = json.loads(path.read_text())
    found[draw.choice([*found, "colour"])] = draw.choice(VALUES)
    path.write_text(json.dumps(found))


def special(folder, draw):
    path = folder / draw.choice([WEIGHTS, CONFIG])
    path.unlink()
    kind = draw.choice(["missing", "pipe", "folder", "device", "loop", "empty", "sparse"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "loop"):
        path.symlink_to("/dev/zero" if kind == "device" else path)
    elif kind in ("empty", "sparse"):
        path.touch()
        os.truncate(path, 0 if kind == "empty" else 2**40)


MUTATIONS = (flip, splice, header, settings, tensors, copy, special)


def fault_of(model, folder) -> str | None:
    """The message with which `load` refuses the folder; None: it loads, and the model is unpatched again."""
    try:
        apt_kernels.load(model, folder)
    except apt_kernels.AdapterError as error:
        return str(error)
    apt_kernels.unpatch(model)
    return None


@pytest.mark.hypothesis
@pytest.mark.parametrize("part", range(PARTS))
def test_a_mutated_adapter_loads_or_names_its_fault(part, good, tmp_path):
    model = models.build("bert")
    before, refused = snapshot(model), 0
    for seed in range(part * COUNT, (part + 1) * COUNT):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(good, folder)
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        mutate(folder, draw)
        with at_most(5):
            fault = fault_of(model, folder)
        if fault is not None:
            refused += 1
            assert str(folder) in fault, seed
            assert len(fault.replace(str(folder), "")) < 800, seed
            fault.encode()
        assert_unchanged(model, before)
        shutil.rmtree(folder)
    assert refused > COUNT / 2
