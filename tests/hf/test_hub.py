"""Adapters to a folder, and to and from a repository of the hub, whose functions are replaced by a folder here."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

import apt_kernels
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot

FAMILIES = models.some(models.FAMILIES)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub: repositories are folders, each with its revisions."""
    there = SimpleNamespace(root=tmp_path / "hub", commits=[], private={})

    def create_repo(repo_id, *, private=None, exist_ok=False):
        huggingface_hub.utils.validate_repo_id(repo_id)
        (there.root / repo_id / "main").mkdir(parents=True, exist_ok=exist_ok)
        there.private[repo_id] = private
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(repo_id, filename):
        return (there.root / repo_id / "main" / filename).exists()

    def upload_folder(*, repo_id, folder_path, allow_patterns, commit_message, path_in_repo=None):
        place = there.root / repo_id / "main" / (path_in_repo or "")
        place.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, place / name)
        there.commits.append((repo_id, commit_message))

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
        folder = there.root / repo_id / (revision or "main")
        if not folder.is_dir():
            raise LocalEntryNotFoundError("no network, and nothing in the cache\nmore lines")
        kept = tmp_path / "cache" / repo_id / (revision or "main")
        for name in allow_patterns:
            if (folder / name).exists():
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, kept / name)
        kept.mkdir(parents=True, exist_ok=True)
        return str(kept)

    for function in (create_repo, file_exists, upload_folder, snapshot_download):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    monkeypatch.chdir(tmp_path)
    return there


def trained(family, head=None, seed=1):
    model = apt_kernels.patch(models.build(family, head), prefix_length=3)
    randomise(model, seed=seed)
    return model


@pytest.mark.proves("save and load")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder(family, tmp_path):
    model, given = trained(family), models.inputs(family, "right")
    apt_kernels.save(model, tmp_path / "adapter")
    twin = apt_kernels.load(models.build(family), tmp_path / "adapter")
    assert torch.equal(twin(**given).logits, model(**given).logits)
    assert not torch.allclose(twin(**given).logits, models.build(family)(**given).logits)


@pytest.mark.proves("save to and load from a hub repository")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repository(family, hub):
    model, given = trained(family), models.inputs(family, "right")
    apt_kernels.save(model, repo_id="someone/adapter", private=True, commit_message="first")
    assert hub.commits == [("someone/adapter", "first")]
    assert hub.private == {"someone/adapter": True}
    files = {path.name for path in (hub.root / "someone/adapter/main").iterdir()}
    assert files == {"adapter.safetensors", "apt_config.json", "README.md"}
    twin = apt_kernels.load(models.build(family), "someone/adapter")
    assert torch.equal(twin(**given).logits, model(**given).logits)
    assert not torch.allclose(twin(**given).logits, models.build(family)(**given).logits)


def test_a_revision_and_a_folder_beside_the_upload(hub, tmp_path):
    old, new, given = trained("llama"), trained("llama", seed=2), models.inputs("llama")
    apt_kernels.save(old, repo_id="someone/adapter")
    shutil.copytree(hub.root / "someone/adapter/main", hub.root / "someone/adapter/v1")
    apt_kernels.save(new, tmp_path / "kept", repo_id="someone/adapter")
    assert (tmp_path / "kept" / "adapter.safetensors").exists()
    for revision, model in (("v1", old), (None, new), ("main", new)):
        twin = apt_kernels.load(models.build("llama"), "someone/adapter", revision=revision)
        assert torch.equal(twin(**given).logits, model(**given).logits)


def test_a_revision_in_the_name_and_a_subfolder(hub, tmp_path):
    old, new, given = trained("llama"), trained("llama", seed=2), models.inputs("llama")
    apt_kernels.save(old, repo_id="someone/adapter", subfolder="adapters/first")
    shutil.copytree(hub.root / "someone/adapter/main", hub.root / "someone/adapter/v1")
    apt_kernels.save(new, repo_id="someone/adapter", subfolder="adapters/first")
    shutil.copytree(hub.root / "someone/adapter/main", tmp_path / "copy")
    for source, model in (("someone/adapter@v1", old), ("someone/adapter", new), (tmp_path / "copy", new)):
        twin = apt_kernels.load(models.build("llama"), source, subfolder="adapters/first")
        assert torch.equal(twin(**given).logits, model(**given).logits)
    with pytest.raises(apt_kernels.AdapterError, match="names a revision, and revision is 'v2'"):
        apt_kernels.load(models.build("llama"), "someone/adapter@v1", revision="v2", subfolder="adapters/first")
    for wrong in ("../x", "/x", "a//b", "", "..\\x"):
        with pytest.raises(apt_kernels.AdapterError, match="it needs a relative path"):
            apt_kernels.load(models.build("llama"), "someone/adapter", subfolder=wrong)
        with pytest.raises(apt_kernels.AdapterError, match="it needs a relative path"):
            apt_kernels.save(new, repo_id="someone/adapter", subfolder=wrong)


def test_the_model_card(hub):
    model = models.build("llama")
    model.config._name_or_path = "owner/base"
    apt_kernels.patch(model, prefix_length=3, gate="static")
    apt_kernels.save(model, repo_id="someone/adapter", metrics={"accuracy": 0.9})
    path = hub.root / "someone/adapter/main/README.md"
    card = huggingface_hub.ModelCard.load(path)
    assert card.data.to_dict() == {
        "library_name": "apt-kernels",
        "tags": ["apt-kernels", "prefix-tuning"],
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "metrics": ["accuracy"],
    }
    for part in (
        'from_pretrained("owner/base")',
        'load(model, "someone/adapter")',
        "| gate | static |",
        "| accuracy | 0.9 |",
    ):
        assert part in card.content
    assert "| prefix lengths | 3 in each of 2 attention modules |" in card.content
    path.write_text("mine")
    apt_kernels.save(model, repo_id="someone/adapter")
    assert path.read_text() == "mine"


def test_the_model_card_does_not_disclose_a_local_path(hub, tmp_path):
    models.build("bert", "AutoModelForSequenceClassification").save_pretrained(tmp_path / "private")
    kind = type(models.build("bert", "AutoModelForSequenceClassification"))
    model = apt_kernels.patch(kind.from_pretrained(tmp_path / "private"), prefix_length=3)
    apt_kernels.save(model, repo_id="someone/adapter", subfolder="first")
    text = (hub.root / "someone/adapter/main/first/README.md").read_text()
    assert str(tmp_path) not in text
    assert 'subfolder="first"' in text
    assert 'pipeline_tag: "text-classification"' in text
    assert "classifier.weight" in text


def test_a_folder_of_the_name_goes_first(hub, tmp_path):
    here, there, given = trained("llama"), trained("llama", seed=2), models.inputs("llama")
    apt_kernels.save(here, "someone/adapter")
    apt_kernels.save(there, repo_id="someone/adapter")
    twin = apt_kernels.load(models.build("llama"), "someone/adapter")
    assert torch.equal(twin(**given).logits, here(**given).logits)


def test_save_pretrained_pushes(hub, tmp_path):
    model, given = trained("llama"), models.inputs("llama")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/mine")
    twin = apt_kernels.load(models.build("llama"), "someone/mine")
    assert torch.equal(twin(**given).logits, model(**given).logits)


def test_what_the_hub_lacks_is_named_and_changes_nothing(hub):
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(
        apt_kernels.AdapterError, match=r"'someone/none' is not a folder on this machine.*LocalEntryNotFoundError: no n"
    ):
        apt_kernels.load(model, "someone/none")
    apt_kernels.save(trained("llama"), repo_id="someone/adapter")
    with pytest.raises(apt_kernels.AdapterError, match="at revision 'v9'"):
        apt_kernels.load(model, "someone/adapter", revision="v9")
    (hub.root / "someone/adapter/main/adapter.safetensors").unlink()
    with pytest.raises(apt_kernels.AdapterError, match=r"has no adapter\.safetensors"):
        apt_kernels.load(model, "someone/adapter")
    for path in ("./someone/adapter", "a/b/c", "adapter"):
        with pytest.raises(apt_kernels.AdapterError, match="does not exist"):
            apt_kernels.load(model, path)
    assert_unchanged(model, before)


def test_an_upload_that_fails_says_what_to_do(hub, monkeypatch):
    with pytest.raises(apt_kernels.AdapterError, match="needs one of them"):
        apt_kernels.save(trained("llama"))
    with pytest.raises(apt_kernels.AdapterError, match=r"could not be written.*HFValidationError.*hf auth login"):
        apt_kernels.save(trained("llama"), repo_id="--no--")
    assert issubclass(HFValidationError, ValueError)
    assert hub.commits == []
