"""What the patch leans on in transformers and PEFT is listed, and a release without it is named in one error."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import cache_utils, configuration_utils, masking_utils

import apt_kernels
from apt_kernels.hf import compat

PACKAGE = Path(apt_kernels.__file__).parent
SOURCES = sorted((PACKAGE / "hf").rglob("*.py"))
# Private names of torch and of Python, and ends of names: not transformers', and not ours.
ELSEWHERE = set(
    "_C _fields _forward_hooks _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks _modules "
    "_forward_pre_hooks_with_kwargs _fsdp_flattened _get_default_store _orig_mod _replace _version _on_ _patch_id "
    "_token_id _token_index".split()
)


def trees():
    return [(path, ast.parse(path.read_text())) for path in SOURCES]


def listed():
    wanted = {**compat.TRANSFORMERS, **compat.PEFT}
    return {f"{module}.{name}".split(":")[0] for module, found in wanted.items() for name in found}


def test_what_is_there_passes():
    compat.check_transformers()
    compat.check_peft()


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (masking_utils, "sliding_window_overlay", "transformers.masking_utils.sliding_window_overlay"),
        (cache_utils.Cache, "batch_select_indices", "transformers.cache_utils.Cache.batch_select_indices"),
        (transformers.PreTrainedModel, "_keys_to_ignore_on_save", "PreTrainedModel._keys_to_ignore_on_save"),
    ],
)
def test_a_name_that_is_gone_is_named_with_the_release(owner, name, said, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(apt_kernels.PatchError) as caught:
        compat.check_transformers()
    assert f"transformers {transformers.__version__} lacks" in str(caught.value)
    assert said in str(caught.value)


def test_every_missing_name_is_in_the_one_error(monkeypatch):
    monkeypatch.delattr(masking_utils, "sdpa_mask")
    monkeypatch.delattr(masking_utils, "and_masks")
    with pytest.raises(apt_kernels.PatchError, match=r"and_masks, transformers\.masking_utils\.sdpa_mask, on which"):
        compat.check_transformers()


def test_an_attribute_of_instances_that_is_renamed(monkeypatch):
    renamed = {"transformers.configuration_utils": ("_attn_implementation_renamed",)}
    monkeypatch.setattr(compat, "TRANSFORMERS_INSTANCES", renamed)
    assert "_attn_implementation_renamed" not in Path(configuration_utils.__file__).read_text()
    with pytest.raises(apt_kernels.PatchError, match="_attn_implementation_renamed"):
        compat.check_transformers()


def test_a_mask_that_closes_over_something_else(monkeypatch):
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda size: lambda b, h, q, k: k > q - size)
    with pytest.raises(apt_kernels.PatchError, match="sliding_window_overlay \\(a function that closes over"):
        compat.check_transformers()


@pytest.mark.parametrize("name", ["masking_utils.prepare_padding_mask", "modeling_layers.GradientCheckpointingLayer"])
def test_the_check_comes_before_the_first_patch(name):
    """In a fresh process, and instead of an ImportError from wherever the name is used."""
    module, _, attribute = name.partition(".")
    code = (
        f"from transformers import {module}; del {module}.{attribute}\n"
        "import apt_kernels\n"
        "try: apt_kernels.patch\n"
        "except apt_kernels.PatchError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"transformers {transformers.__version__} lacks transformers.{name}" in done.stdout


def test_no_import_from_inside_transformers_or_peft_goes_unlisted():
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            inside = isinstance(node, ast.ImportFrom) and not node.level and node.module
            if inside and node.module.split(".")[0] in ("transformers", "peft") and "." in node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "masking_utils"
            ):
                found.add(f"transformers.masking_utils.{node.attr}")
    found.discard("transformers.masking_utils.__name__")
    assert len(found) > 5
    heads = listed() | {name.rpartition(".")[0] for name in listed()}
    assert found <= heads


def test_no_private_attribute_goes_unlisted():
    """Names that begin with an underscore, read or set on something that is not ours."""
    ours, used = set(), {}
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                ours.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.setdefault(node.attr, path.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                used.setdefault(node.value, path.name)
    private = {n for n in used if n.startswith("_") and not n.startswith("__")}
    wanted = {part for name in listed() for part in name.split(".")}
    wanted |= {name for found in compat.TRANSFORMERS_INSTANCES.values() for name in found}
    unlisted = {name: used[name] for name in private - ours - wanted - ELSEWHERE if "_apt" not in name}
    assert unlisted == {}
