"""The files of an adapter: one rename is the commit, every damage is noticed, nothing is read beyond its bounds."""

import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from apt_kernels import AdapterError, AptConfig
from apt_kernels.hf import adapter_file
from apt_kernels.hf.adapter_file import CONFIG, WEIGHTS, open_adapter, write_adapter
from helpers.processor_time import at_most

SETTINGS = AptConfig(prefix_length=3).to_json()


def tensors(value=1.0):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return {f"layer.{i}.apt.key": torch.full((2, i + 1, 3), value, dtype=dtype) for i, dtype in enumerate(dtypes)}


def read(folder):
    with open_adapter(folder) as file:
        return file.settings, file.tensors()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back_by_us_and_by_safetensors(tmp_path):
    given = {**tensors(), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 4), "view": torch.arange(6.0)[::2]}
    save_id = write_adapter(tmp_path, given, SETTINGS)
    settings, found = read(tmp_path)
    assert settings == {**SETTINGS, "save_id": save_id} == json.loads((tmp_path / CONFIG).read_text())
    theirs = load_file(tmp_path / WEIGHTS)
    assert found.keys() == given.keys() == theirs.keys()
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(theirs[name], tensor), name
        assert found[name].dtype == tensor.dtype
    assert names(tmp_path) == [WEIGHTS, CONFIG]
    assert AptConfig.from_json(json.loads((tmp_path / CONFIG).read_text())) == AptConfig(prefix_length=3)


def test_files_of_release_0_1_load(tmp_path):
    save_file(tensors(), tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps({**SETTINGS, "format": 1, "model": "BertModel", "lengths": {}}))
    settings, found = read(tmp_path)
    assert settings["format"] == 1
    assert torch.equal(found["layer.0.apt.key"], tensors()["layer.0.apt.key"])


def test_the_copy_may_be_missing_or_of_an_earlier_save_and_is_put_right(tmp_path):
    write_adapter(tmp_path, tensors(1.0), SETTINGS)
    old = (tmp_path / CONFIG).read_bytes()
    save_id = write_adapter(tmp_path, tensors(2.0), {**SETTINGS, "gate": "none"})
    for copy in (old, None, json.dumps({**SETTINGS, "format": 1, "model": "X", "lengths": {}}).encode()):
        (tmp_path / CONFIG).unlink() if copy is None else (tmp_path / CONFIG).write_bytes(copy)
        settings, found = read(tmp_path)
        assert (settings["save_id"], settings["gate"]) == (save_id, "none")
        assert found["layer.0.apt.key"].eq(2).all()
    save_id = write_adapter(tmp_path, tensors(3.0), SETTINGS)
    assert json.loads((tmp_path / CONFIG).read_text())["save_id"] == save_id


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_copy_of_this_save_with_other_contents_is_refused(tmp_path):
    write_adapter(tmp_path, tensors(), SETTINGS)
    edit(tmp_path / CONFIG, gate="none")
    with pytest.raises(AdapterError, match=r"apt_config\.json differs from the settings.*'gate'"):
        read(tmp_path)


def test_weights_without_settings_beside_a_copy_of_another_save_are_refused(tmp_path):
    write_adapter(tmp_path, tensors(), SETTINGS)
    save_file(tensors(2.0), tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="was saved with other weights"):
        read(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path):
    write_adapter(tmp_path, {"apt.key": torch.randn(2, 3)}, SETTINGS)
    (tmp_path / CONFIG).unlink()
    path = tmp_path / WEIGHTS
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in random.Random(at).sample(range(8), 2):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(AdapterError, match=r"adapter\.safetensors"):
                read(tmp_path)


def test_every_truncation_and_any_tail_is_noticed(tmp_path):
    write_adapter(tmp_path, tensors(), SETTINGS)
    path = tmp_path / WEIGHTS
    good = path.read_bytes()
    for length in {0, 1, 7, 8, 9, *range(0, len(good), 13), len(good) - 1}:
        path.write_bytes(good[:length])
        with pytest.raises(AdapterError, match=r"adapter\.safetensors"):
            read(tmp_path)
    path.write_bytes(good + b"\0")
    with pytest.raises(AdapterError, match="damaged"):
        read(tmp_path)


def test_swapped_tensors_are_noticed(tmp_path):
    write_adapter(tmp_path, {"a": torch.zeros(4), "b": torch.ones(4)}, SETTINGS)
    path = tmp_path / WEIGHTS
    good = path.read_bytes()
    swapped = good.replace(b'"a":{', b'"c":{').replace(b'"b":{', b'"a":{').replace(b'"c":{', b'"b":{')
    for harmed in (swapped, good[:-32] + good[-16:] + good[-32:-16]):
        assert harmed != good
        path.write_bytes(harmed)
        with pytest.raises(AdapterError, match="checksum"):
            read(tmp_path)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes):
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


HOSTILE = {
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "a header that is a list": raw([]),
    "a number of a million digits": raw(b'{"x":' + b"1" * 10**6 + b"}"),
    "a float of a million digits": raw(b'{"x":1e' + b"9" * 10**6 + b"}"),
    "a million brackets": raw(b"[" * 10**6),
    "a million objects": raw(b'{"a":' * 10**6),
    "NaN": raw(b'{"x": NaN}'),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "half a surrogate pair": raw(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "a name twice": raw(b'{"x": {}, "x": {}}'),
    "no dtype": raw({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "an unknown dtype": raw(one(dtype="F99"), bytes(8)),
    "a dtype that is a list": raw(one(dtype=["F32"]), bytes(8)),
    "a negative shape": raw(one(shape=[-2]), bytes(8)),
    "a shape of booleans": raw(one(shape=[True, 2]), bytes(8)),
    "a shape larger than the file": raw(one(shape=[10**17]), bytes(8)),
    "a shape whose product overflows": raw(one(shape=[2**32, 2**32, 0, 2]), bytes(8)),
    "many dimensions": raw(one(shape=[1] * 10**5 + [2]), bytes(8)),
    "offsets beyond the file": raw(one(data_offsets=[0, 8000], shape=[2000]), bytes(8)),
    "offsets that overlap": raw({**one(), "y": one()["x"]}, bytes(8)),
    "a gap": raw(one(data_offsets=[8, 16]), bytes(16)),
    "metadata that is a list": raw({"__metadata__": [1]}),
    "metadata of numbers": raw({"__metadata__": {"format": 1}}),
    "unknown metadata": raw({"__metadata__": {"apt_kernelz": "{}"}}),
    "half of our metadata": raw({"__metadata__": {"apt_kernels": "{}"}}),
    "settings that are deep": raw({"__metadata__": {"apt_kernels": "[" * 10**5, "apt_kernels.checksum": "x"}}),
    "settings without a save id": raw({"__metadata__": {"apt_kernels": "{}", "apt_kernels.checksum": "x"}}),
    "not safetensors": b"\x80\x04pickle" * 9,
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_hostile_weights_end_in_an_error_that_names_the_file(harm, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(HOSTILE[harm])
    (tmp_path / CONFIG).write_text(json.dumps({**SETTINGS, "format": 1}))
    with at_most(5), pytest.raises(AdapterError, match=r"adapter\.safetensors") as caught:
        read(tmp_path)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 600
    str(caught.value).encode()


def test_special_files_are_refused(tmp_path):
    def pipe(path):
        os.mkfifo(path)

    def listening(path):
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)
            server.bind(path.name)

    def folder(path):
        path.mkdir()

    def device(path):
        path.symlink_to("/dev/zero")

    def loop(path):
        path.symlink_to(path.name)

    write_adapter(tmp_path / "good", tensors(), SETTINGS)
    here = os.getcwd()
    for make, reason in ((pipe, "a pipe"), (listening, "a socket"), (folder, "a folder"), (device, "a device")):
        for name in (WEIGHTS, CONFIG):
            place = tmp_path / f"{make.__name__}-{name}"
            place.mkdir()
            if name == CONFIG:
                (place / WEIGHTS).write_bytes((tmp_path / "good" / WEIGHTS).read_bytes())
            try:
                make(place / name)
            finally:
                os.chdir(here)
            with pytest.raises(AdapterError, match=f"{name} is {reason}"):
                read(place)
    loop(tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="cannot be read"):
        read(tmp_path)


def test_links_of_a_cache_are_followed(tmp_path):
    write_adapter(tmp_path / "blobs", tensors(), SETTINGS)
    (tmp_path / "snapshot").mkdir()
    for name in (WEIGHTS, CONFIG):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert read(tmp_path / "snapshot")[1].keys() == tensors().keys()


# Which call of the step fails: that for the weights, or that for the copy, which is not serialised.
STEPS = [(step, count) for step in ("mkstemp", "_serialise", "fsync", "chmod", "replace") for count in (1, 2)]
STEPS.remove(("_serialise", 2))


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(("step", "count"), STEPS)
def test_a_failure_at_any_step_leaves_the_old_or_the_new_adapter(step, count, kind, tmp_path, monkeypatch):
    owner = {"mkstemp": adapter_file.tempfile, "_serialise": adapter_file}.get(step, adapter_file.os)
    write_adapter(tmp_path, tensors(1.0), SETTINGS)
    original, calls = getattr(owner, step), []

    def fail(*args, **kwargs):
        calls.append(step)
        if len(calls) == count:
            if step == "_serialise":
                args[0].write(b"half")
            raise kind("no space")
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, fail)
        if step == "fsync" and count == 2 and kind is OSError:  # of the folder: the save has been done by then
            write_adapter(tmp_path, tensors(2.0), {**SETTINGS, "gate": "none"})
        else:
            with pytest.raises(AdapterError if kind is OSError else kind, match="no space"):
                write_adapter(tmp_path, tensors(2.0), {**SETTINGS, "gate": "none"})
    assert len(calls) >= count
    settings, found = read(tmp_path)
    value, gate = (1, "auto") if count == 1 else (2, "none")
    assert settings["gate"] == gate
    assert all(tensor.eq(value).all() for tensor in found.values())
    assert names(tmp_path) == [WEIGHTS, CONFIG]


def test_leftovers_of_killed_saves_are_deleted_and_those_of_living_ones_kept(tmp_path):
    dead = tmp_path / f".{WEIGHTS}.killed.tmp"
    old = tmp_path / f".{CONFIG}.abcdefgh"
    young = tmp_path / f".{CONFIG}.ijklmnop"
    others = tmp_path / ".adapter.notes"
    for path in (dead, old, young, others):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    with adapter_file.replacing(tmp_path / WEIGHTS) as file:
        file.write(save({"x": torch.ones(1)}))
        write_adapter(tmp_path, tensors(), SETTINGS)
        assert len(list(tmp_path.glob(f".{WEIGHTS}.*"))) == 1
    assert not dead.exists()
    assert not old.exists()
    assert young.exists()
    assert others.exists()


def killed_at(line, folder):
    """In this process: save an adapter, and die at the ``line``-th line of ours that runs."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if not frame.f_code.co_filename.endswith("adapter_file.py"):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os._exit(1)
        return trace

    sys.settrace(trace)
    write_adapter(folder, {name: tensor + 1 for name, tensor in tensors().items()}, {**SETTINGS, "gate": "none"})
    sys.settrace(None)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing here")
@pytest.mark.slow
def test_a_process_killed_at_every_line_leaves_the_old_or_the_new_adapter(tmp_path):
    write_adapter(tmp_path, tensors(), SETTINGS)
    values, line = [], 0
    while True:
        line += 1
        child = os.fork()
        if not child:
            try:
                killed_at(line, tmp_path)
            finally:
                os._exit(2)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 1), line
        settings, found = read(tmp_path)
        value = found["layer.0.apt.key"].unique().item()
        assert settings["gate"] == {1: "auto", 2: "none"}[value], line
        assert all(tensor.eq(value).all() for tensor in found.values()), line
        leftovers = [path for path in tmp_path.iterdir() if path.name not in (WEIGHTS, CONFIG)]
        assert len(leftovers) <= 1, line  # what the child before this one left was deleted
        values.append(value)
        if status == 0:
            break
        if value == 2:  # begin with the old one again
            write_adapter(tmp_path, tensors(), SETTINGS)
    assert values == sorted(values), "one line is the commit"
    assert values.count(1) > 50
    assert values.count(2) > 10
    assert names(tmp_path) == [WEIGHTS, CONFIG]


def keep_saving(folder, value):
    torch.set_num_threads(1)
    for step in range(10**6):
        adapter = {"x": torch.full((50_000,), float(value + step % 7)), "y": torch.full((3,), float(value + step % 7))}
        write_adapter(folder, adapter, {**SETTINGS, "lengths": {"x": value + step % 7}})


def keep_reading(folder, found):
    """Read until 200 reads met 10 saves, or for a minute; report how many saves were seen, or what was wrong."""
    torch.set_num_threads(1)  # a forked process has no threads of torch
    seen, reads, end = set(), 0, time.monotonic() + 60
    try:
        while (reads < 200 or len(seen) < 10) and time.monotonic() < end:
            settings, tensors = read(folder)
            reads += 1
            value = settings["lengths"]["x"]
            if not (tensors["x"].eq(value).all() and tensors["y"].eq(value).all()):
                raise AssertionError(f"the settings are of save {value}, the tensors are not")
            seen.add(settings["save_id"])
        found.put(len(seen))
    except BaseException as error:
        found.put(f"{type(error).__name__}: {error}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing here")
def test_readers_in_several_processes_beside_savers_see_whole_adapters(tmp_path):
    context, found = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").SimpleQueue()
    write_adapter(tmp_path, {"x": torch.zeros(50_000), "y": torch.zeros(3)}, {**SETTINGS, "lengths": {"x": 0}})
    savers = [context.Process(target=keep_saving, args=(tmp_path, value)) for value in (10, 20)]
    readers = [context.Process(target=keep_reading, args=(tmp_path, found)) for _ in range(3)]
    try:
        for process in (*savers, *readers):
            process.start()
        for reader in readers:
            reader.join(timeout=120)
        assert not any(reader.is_alive() for reader in readers)
        counts = [found.get() for _ in readers]
    finally:
        for process in (*savers, *readers):
            process.kill()
            process.join()
    assert all(isinstance(count, int) and count >= 10 for count in counts), counts


@pytest.mark.slow
def test_readers_beside_savers_that_are_killed_see_whole_adapters(tmp_path):
    """Two savers, killed at random moments and started again; each read is one save's, settings and tensors."""
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    write_adapter(tmp_path, {"x": torch.zeros(50_000), "y": torch.zeros(3)}, {**SETTINGS, "lengths": {"x": 0}})
    seen, end = set(), time.monotonic() + 120
    savers, killed = [], 0
    try:
        while (killed < 50 or len(seen) < 20) and time.monotonic() < end:
            savers = [saver for saver in savers if saver.is_alive()]
            while len(savers) < 2:
                savers.append(context.Process(target=keep_saving, args=(tmp_path, draw.choice([10, 20]))))
                savers[-1].start()
            stop = time.monotonic() + draw.uniform(0.02, 0.2)
            while time.monotonic() < stop:
                settings, found = read(tmp_path)
                value = settings["lengths"]["x"]
                assert found["x"].eq(value).all()
                assert found["y"].eq(value).all()
                seen.add(settings["save_id"])
            os.kill(draw.choice(savers).pid, signal.SIGKILL)
            killed += 1
            for saver in savers:
                saver.join(timeout=0.02)
    finally:
        for saver in savers:
            saver.kill()
            saver.join()
    assert killed >= 50
    assert len(seen) >= 20
    write_adapter(tmp_path, tensors(), SETTINGS)
    assert names(tmp_path) == [WEIGHTS, CONFIG]
