"""``python -m apt_kernels``: what it prints, and its exit codes."""

import subprocess
import sys

import pytest
import torch

import apt_kernels
from apt_kernels.__main__ import main
from helpers import models
from helpers.patched import randomise


@pytest.fixture
def folders(tmp_path):
    """A base model, the same with other weights, and an adapter of the first."""
    base = models.build("llama")
    base.save_pretrained(tmp_path / "base")
    other = models.build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    model = type(base).from_pretrained(tmp_path / "base")
    apt_kernels.patch(model, prefix_length=5, gate="static")
    randomise(model)
    apt_kernels.save(model, tmp_path / "adapter")
    return tmp_path, model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 14)[None]).logits


def test_info_runs_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; from apt_kernels.__main__ import main; main(['info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "implementations" in done.stdout


def test_inspect(folders, capsys):
    root, _ = folders
    assert main(["inspect", str(root / "adapter")]) == 0
    said = capsys.readouterr().out
    for part in ("'default', format 2", "static, with a layer scale", "2 attention modules, 5 tokens each"):
        assert part in said
    assert f"llama, {root / 'base'} (hidden_size 32" in said
    assert "checksum   matches" in said


def test_inspect_names_what_is_wrong(folders, capsys):
    root, _ = folders
    assert main(["inspect", str(root / "base")]) == 1
    assert "is not an adapter folder" in capsys.readouterr().err
    path = root / "adapter" / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["inspect", str(root / "adapter")]) == 1
    assert "its contents do not match its checksum" in capsys.readouterr().err


def test_a_base_that_is_no_model_is_named(folders, capsys):
    root, _ = folders
    (root / "empty").mkdir()
    empty, adapter, out = str(root / "empty"), str(root / "adapter"), str(root / "out")
    for given in (["check", empty, adapter], ["convert", "--to", "peft", "--base", empty, adapter, out]):
        assert main(given) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert empty in said
    assert not (root / "out").exists()


def test_check_tells_what_differs(folders, capsys):
    root, _ = folders
    assert main(["check", str(root / "base"), str(root / "adapter")]) == 0
    assert "fits" in capsys.readouterr().out
    assert main(["check", str(root / "other"), str(root / "adapter")]) == 3
    said = capsys.readouterr().out
    assert "fits" in said
    assert "differs: " in said
    assert "trained on other weights" in said
    models.build("qwen3").save_pretrained(root / "qwen3")
    assert main(["check", str(root / "qwen3"), str(root / "adapter")]) == 1
    assert "was trained on a model of the type 'llama'" in capsys.readouterr().err
    models.build("llama", num_hidden_layers=3).save_pretrained(root / "deep")
    assert main(["check", str(root / "deep"), str(root / "adapter")]) == 1
    assert "num_hidden_layers 2; this one has 3" in capsys.readouterr().err
    assert main(["check", str(root / "nowhere"), str(root / "adapter")]) == 1


def test_convert_there_and_back(folders, capsys):
    root, model = folders
    assert main(["convert", "--to", "peft", str(root / "adapter"), str(root / "peft")]) == 0
    assert "exact" in capsys.readouterr().out
    given = ["convert", "--to", "apt", "--base", str(root / "base"), str(root / "peft"), str(root / "back")]
    assert main(given) == 0
    twin = apt_kernels.load(type(model).from_pretrained(root / "base"), root / "back")
    assert (logits(model) - logits(models.build("llama"))).abs().max() > 1e-2
    # The keys were rotated by M and back in float32.
    torch.testing.assert_close(logits(twin), logits(model), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_converted(folders, capsys):
    root, _ = folders
    model = apt_kernels.patch(models.build("llama"), prefix_length=5)
    apt_kernels.save(model, root / "gated")
    given = ["convert", "--to", "peft", str(root / "gated"), str(root / "out")]
    assert main(given) == 1
    assert "does not record the name of its base model" in capsys.readouterr().err
    assert main([*given, "--base", str(root / "base")]) == 1
    said = capsys.readouterr().err
    assert "whose weights depend on the input" in said
    assert "On the command line: --texts FILE" in said
    assert not (root / "out").exists()


@pytest.mark.parametrize("given", [[], ["nothing"], ["convert", "a", "b"], ["check", "a"]])
def test_wrong_arguments(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
    assert "{info,inspect,check,convert,lm-eval}" in capsys.readouterr().err
