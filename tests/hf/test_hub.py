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

    def upload_folder(*, repo_id, folder_path, allow_patterns, commit_message):
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, there.root / repo_id / "main" / name)
        there.commits.append((repo_id, commit_message))

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
        folder = there.root / repo_id / (revision or "main")
        if not folder.is_dir():
            raise LocalEntryNotFoundError("no network, and nothing in the cache\nmore lines")
        kept = tmp_path / "cache" / repo_id / (revision or "main")
        shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=lambda _, names: set(names) - set(allow_patterns))
        return str(kept)

    for function in (create_repo, upload_folder, snapshot_download):
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
    assert files == {"adapter.safetensors", "apt_config.json"}
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
        apt_kernels.AdapterError, match=r"'someone/none' is no folder here.*LocalEntryNotFoundError: no n"
    ):
        apt_kernels.load(model, "someone/none")
    apt_kernels.save(trained("llama"), repo_id="someone/adapter")
    with pytest.raises(apt_kernels.AdapterError, match="at revision 'v9'"):
        apt_kernels.load(model, "someone/adapter", revision="v9")
    (hub.root / "someone/adapter/main/adapter.safetensors").unlink()
    with pytest.raises(apt_kernels.AdapterError, match=r"has no adapter\.safetensors"):
        apt_kernels.load(model, "someone/adapter")
    for path in ("./someone/adapter", "a/b/c", "adapter"):
        with pytest.raises(apt_kernels.AdapterError, match=r"has no apt_config\.json"):
            apt_kernels.load(model, path)
    assert_unchanged(model, before)


def test_an_upload_that_fails_says_what_to_do(hub, monkeypatch):
    with pytest.raises(apt_kernels.AdapterError, match="needs one of them"):
        apt_kernels.save(trained("llama"))
    with pytest.raises(apt_kernels.AdapterError, match=r"could not be written.*HFValidationError.*hf auth login"):
        apt_kernels.save(trained("llama"), repo_id="--no--")
    assert issubclass(HFValidationError, ValueError)
    assert hub.commits == []
