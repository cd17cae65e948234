"""sentence-transformers saves a patched model, and reads it back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import apt_kernels
from helpers import models
from helpers.patched import randomise

TEXTS = ["a b", "c d e"]


def base(folder):
    """A tiny model and its tokenizer, as a folder of transformers."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(models.config("bert")).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def sentences():
    return pytest.importorskip("sentence_transformers", reason="the package sentence-transformers is not installed")


@pytest.fixture
def model(sentences, tmp_path):
    made = sentences.SentenceTransformer(str(base(tmp_path / "base")), device="cpu")
    apt_kernels.patch(made[0].model, prefix_length=3, gate="first")
    randomise(made[0].model)
    return made


def test_it_saves_the_adapter_and_reads_it_back(sentences, model, tmp_path):
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (again.encode(TEXTS) == expected).all()
    with apt_kernels.disabled(again[0].model):
        assert (again.encode(TEXTS) != expected).any()
    # The other way of reading it.
    other = sentences.SentenceTransformer(str(tmp_path / "base"), device="cpu")
    apt_kernels.load(other[0].model, tmp_path / "saved")
    assert (other.encode(TEXTS) == expected).all()


def test_the_best_checkpoint_goes_into_the_model_that_trains(sentences, model, tmp_path):
    """What the trainer does for load_best_model_at_end and resume_from_checkpoint."""
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "checkpoint-2"))
    randomise(model[0].model, seed=5)
    assert (model.encode(TEXTS) != expected).any()
    loaded = sentences.SentenceTransformer(str(tmp_path / "checkpoint-2"), device="cpu")
    model.load_state_dict(loaded.state_dict())
    assert (model.encode(TEXTS) == expected).all()


def test_a_folder_of_an_earlier_version_is_read(sentences, model, tmp_path):
    expected, folder = model.encode(TEXTS), tmp_path / "saved"
    model.save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "apt_kernels adapter (apt_kernels.load loads it into a model)"
    (folder / "config.json").write_text(json.dumps(config))
    assert (sentences.SentenceTransformer(str(folder), device="cpu").encode(TEXTS) == expected).all()
    model.save_pretrained(str(folder))


def test_an_unpatched_model_is_saved_as_a_whole(sentences, model, tmp_path):
    apt_kernels.unpatch(model[0].model)
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "adapter.safetensors").exists()
    assert (sentences.SentenceTransformer(str(tmp_path / "whole"), device="cpu").encode(TEXTS) == expected).all()


FRESH = """
import sys
{imports}

try:
    model = SentenceTransformer(sys.argv[1], device="cpu")
except ValueError as error:
    said = "SentenceTransformer(folder) after `import apt_kernels`" in str(error)
    sys.exit(0 if said and not {imported} else f"refused: {{error}}")
sys.exit(0 if {imported} and hasattr(model[0].model, "_apt_state") else "there is no prefix")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import apt_kernels\nfrom sentence_transformers import SentenceTransformer",
        "from sentence_transformers import SentenceTransformer\nimport apt_kernels",
        "from sentence_transformers import SentenceTransformer",
    ],
)
def test_a_fresh_process(imports, sentences, model, tmp_path):
    """It has to import this package; without it, the folder is refused and the message says so.

    A class of ours in modules.json would be imported by sentence-transformers, but only with trust_remote_code=True.
    """
    model.save_pretrained(str(tmp_path / "saved"))
    code = FRESH.format(imports=imports, imported="apt_kernels" in imports)
    arguments = [sys.executable, "-c", code, str(tmp_path / "saved")]
    root = Path(__file__).parents[3]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_adapter_that_does_not_name_its_base_is_refused(sentences, model, tmp_path):
    from safetensors.torch import load_file

    from apt_kernels.hf import adapter_file

    folder = tmp_path / "saved"
    model.save_pretrained(str(folder))
    with adapter_file.open_adapter(folder) as file:
        settings = file.settings
    tensors = load_file(folder / "adapter.safetensors")
    for record in ({**settings["base"], "name_or_path": None}, None):
        adapter_file.write_adapter(folder, tensors, {**settings, "base": record})
        with pytest.raises(apt_kernels.AdapterError, match="does not name the base model"):
            sentences.SentenceTransformer(str(folder), device="cpu")


def with_lora(model):
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2))


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, lambda model: None, "has no name or path"),
        ({}, with_lora, "the weights that PEFT added"),
        ({"reparameterisation": 4}, lambda model: None, "holds no reparameterisation"),
    ],
)
def test_what_it_could_not_read_back_is_refused(settings, change, message, tmp_path):
    """It writes this file, then calls save_pretrained of the model inside."""
    model = transformers.AutoModel.from_config(models.config("bert"))
    apt_kernels.patch(model, prefix_length=3, **settings)
    model.config.name_or_path = "" if "name" in message else "some/model"
    change(model)
    (tmp_path / "config_sentence_transformers.json").write_text("{}")
    with pytest.raises(apt_kernels.AdapterError, match=f"could not load the prefix back.*{message}.*apt_kernels.save"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config_sentence_transformers.json"]
    apt_kernels.save(model, tmp_path / "adapter")
