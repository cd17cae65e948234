"""Private names of transformers, PEFT and torch are listed by feature; a missing one disables that feature alone."""

import ast
import importlib.util
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import cache_utils, configuration_utils, masking_utils, modeling_layers

import apt_kernels
from apt_kernels.hf import compat
from helpers import models
from helpers.patched import assert_unchanged, snapshot

TESTS = Path(__file__).parents[1]
PACKAGE = Path(apt_kernels.__file__).parent
SOURCES = sorted((PACKAGE / "hf").rglob("*.py"))
# Private names of Python, and ends of names.
ELSEWHERE = set("_fields _is_owned _replace _on_ _patch_id _token_id _token_index".split())


def trees():
    return [(path, ast.parse(path.read_text())) for path in SOURCES]


def listed():
    wanted = [pair for feature in compat.FEATURES.values() for pair in feature.names.items()]
    return {f"{module}.{name}" for module, found in wanted for name in found}


def forget():
    compat.missing.cache_clear()
    compat._warned.clear()


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What a test makes missing is forgotten after it."""
    forget()
    yield
    forget()


@pytest.fixture
def without(monkeypatch):
    """Take a name away from its owner, as a release that has renamed it."""

    def take(owner, name):
        monkeypatch.delattr(owner, name)
        forget()

    return take


@pytest.fixture
def renamed(monkeypatch):
    """Let a feature need a name that no release has, where transformers itself breaks without the one that it has."""

    def change(feature, module, name):
        needs = replace(compat.FEATURES[feature], names={module: (name,)}, instances={})
        monkeypatch.setitem(compat.FEATURES, feature, needs)
        forget()

    return change


def test_nothing_is_missing():
    """Of sentence-transformers, where it is installed: nothing else needs it."""
    optional = {"sentence-transformers"} if importlib.util.find_spec("sentence_transformers") is None else set()
    features = compat.FEATURES.keys() - optional
    assert {name: compat.missing(name) for name in features} == dict.fromkeys(features, ())


def test_a_name_that_is_gone_is_named_with_the_release_and_the_feature(without):
    without(cache_utils.Cache, "batch_select_indices")
    without(cache_utils.Cache, "crop")
    with pytest.raises(apt_kernels.PatchError) as caught:
        compat.require("patch", "gate cache")
    assert str(caught.value) == (
        f"transformers {transformers.__version__} lacks transformers.cache_utils.Cache.batch_select_indices, "
        "transformers.cache_utils.Cache.crop, which gate='first' in a decoder needs. "
        "Install transformers 5.17 to 5.23, or a newer apt_kernels"
    )
    assert not compat.missing("trainer")


def test_every_feature_is_asked_for_and_says_what_happens_without_it():
    for name, feature in compat.FEATURES.items():
        sources = [path.read_text() for path in SOURCES if path.name != "compat.py"]
        assert bool(feature.without) == any(f'available("{name}")' in source for source in sources), name
        assert any(f'"{name}"' in source for source in sources), name


def test_an_attribute_of_instances_that_is_renamed(monkeypatch):
    renamed = compat.Feature("x", "transformers", instances={"transformers.configuration_utils": ("_attn_renamed",)})
    monkeypatch.setitem(compat.FEATURES, "x", renamed)
    assert "_attn_renamed" not in Path(configuration_utils.__file__).read_text()
    with pytest.raises(apt_kernels.PatchError, match="configuration_utils: _attn_renamed"):
        compat.require("x")


@pytest.mark.parametrize("name", ["masking_utils.prepare_padding_mask", "modeling_utils.ALL_ATTENTION_FUNCTIONS"])
def test_the_check_comes_before_the_first_patch(name):
    """In a fresh process, and instead of an ImportError from wherever the name is used."""
    module, _, attribute = name.partition(".")
    code = (
        f"import transformers; from transformers import {module}; transformers.PreTrainedModel\n"
        f"del {module}.{attribute}\n"
        "import apt_kernels\n"
        "try: apt_kernels.patch\n"
        "except apt_kernels.PatchError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"transformers {transformers.__version__} lacks transformers.{name}" in done.stdout


def test_a_mask_that_closes_over_something_else(monkeypatch):
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda size: lambda b, h, q, k: k > q - size)
    with pytest.warns(UserWarning, match="sliding_window_overlay \\(a function that closes over.*but slower"):
        assert not compat.available("masks")


DENSE = """
import warnings, torch
from transformers import masking_utils
from helpers import models
import apt_kernels
whole = masking_utils.sliding_window_overlay
masking_utils.sliding_window_overlay = lambda size: (lambda inside: lambda *places: inside(*places))(whole(size))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = apt_kernels.patch(models.build("mistral").double(), prefix_length=3, init_seed=0)
said = [str(w.message) for w in caught if "apt_kernels" in str(w.message)]
assert len(said) == 1 and "sliding_window_overlay" in said[0], said
from apt_kernels.hf.attention import function
seen, attend = [], function.attention
function.attention = lambda *a, mask=None, **k: (seen.append(mask), attend(*a, mask=mask, **k))[1]
print(model(**models.inputs("mistral", "left")).logits.abs().sum().item())
assert seen and all(mask.dense is not None for mask in seen)
"""


def test_without_the_parts_of_masks_they_are_dense_and_exact():
    done = subprocess.run([sys.executable, "-c", DENSE], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = apt_kernels.patch(models.build("mistral").double(), prefix_length=3, init_seed=0)
    expected = model(**models.inputs("mistral", "left")).logits.abs().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-6)  # a window off by one moves it by 1e-2


def test_inline_attention_alone_is_refused(without):
    without(torch.nn.functional, "has_torch_function")
    config = transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=99, n_positions=32)
    model = transformers.GPTJForCausalLM(config)
    with (
        pytest.warns(UserWarning, match="has_torch_function"),
        pytest.raises(apt_kernels.PatchError, match="no attention"),
    ):
        apt_kernels.patch(model)
    apt_kernels.patch(models.build("llama"))


def test_gate_first_in_a_decoder_alone_is_refused(without):
    without(cache_utils.Cache, "crop")
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match=r"lacks transformers.cache_utils.Cache.crop, which gate='first'"):
        apt_kernels.patch(model, gate="first")
    assert_unchanged(model, before)
    apt_kernels.patch(model)
    with pytest.raises(apt_kernels.PatchError, match=r"Cache\.crop"):
        apt_kernels.add_adapter(model, "x", gate="first")
    apt_kernels.patch(models.build("bert"), gate="first")


def test_patch_from_peft_alone_is_refused(renamed, tmp_path):
    renamed("patch_from_peft", "transformers", "DynamicCacheRenamed")
    with pytest.raises(apt_kernels.PatchError, match="DynamicCacheRenamed"):
        apt_kernels.patch_from_peft(models.build("llama"), tmp_path)
    apt_kernels.patch_from_text(models.build("llama"), [5, 6, 7])


def test_a_checkpointed_training_step_alone_is_refused(without):
    without(modeling_layers.GradientCheckpointingLayer, "gradient_checkpointing")
    model, given = models.build("llama"), models.inputs("llama")
    before = snapshot(model)
    for layer in model.model.layers:
        layer.gradient_checkpointing = False
    apt_kernels.patch(model).train()(**given).logits.sum().backward()
    model.gradient_checkpointing_enable()
    with pytest.raises(apt_kernels.PatchError, match=r"GradientCheckpointingLayer\.gradient_checkpointing"):
        model(**given)
    with torch.no_grad():
        model(**given)
    model.gradient_checkpointing_disable()
    apt_kernels.unpatch(model.eval())
    assert snapshot(model)["hooks"][0] == before["hooks"][0]


def test_trainer_warns_once_and_saving_goes_on(renamed, tmp_path):
    renamed("trainer", "transformers", "PreTrainedModel._keys_renamed")
    with pytest.warns(UserWarning, match=r"PreTrainedModel._keys_renamed.*as missing when it resumes"):
        model = apt_kernels.patch(models.build("llama"))
    assert model._keys_to_ignore_on_save == models.build("llama")._keys_to_ignore_on_save
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.patch(models.build("llama"))
    model.save_pretrained(tmp_path)
    apt_kernels.load(models.build("llama"), tmp_path)
    apt_kernels.unpatch(model)


def test_a_quantised_model_warns_and_is_patched(renamed):
    renamed("trainer, quantised", "transformers", "PreTrainedModel._hf_renamed")
    model = models.build("llama")
    model.is_quantized = True
    with pytest.warns(UserWarning, match=r"_hf_renamed.*refuse to train the quantised"):
        apt_kernels.patch(model)
    assert "_hf_peft_config_loaded" not in model.__dict__


def test_continuous_batching_alone_is_refused(renamed):
    renamed("continuous batching", "transformers", "GenerationMixin.destroy_renamed")
    model = apt_kernels.patch(models.build("llama"), gate="token")
    with pytest.raises(apt_kernels.PatchError, match="destroy_renamed, which continuous"):
        model.generate_batch([[5, 6]])
    model.generate(models.inputs("llama")["input_ids"], max_new_tokens=1)
    apt_kernels.unpatch(model)
    assert "init_continuous_batching" not in vars(model)


def test_a_compiled_model_alone_is_refused(renamed):
    renamed("compiled models", "torch", "_orig_mod_renamed")
    model = apt_kernels.patch(models.build("llama"))
    with pytest.raises(apt_kernels.PatchError, match="_orig_mod_renamed"):
        apt_kernels.prefixes(torch.compile(model))
    apt_kernels.prefixes(model)


# PEFT has another name for something that only we use: renamed as its module is imported.
IMPORT_PEFT = """
import importlib.util, sys, warnings

class Rename:
    def find_spec(self, name, path=None, target=None):
        if name != "{module}":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            kind = getattr(module, "{kind}")
            kind.renamed = getattr(kind, "{name}")
            delattr(kind, "{name}")
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Rename())
from helpers import models
import apt_kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if "{first}" == "import":
        import peft
    apt_kernels.patch(models.build("llama"))
    import peft
    apt_kernels.patch(models.build("bert"))
said = [str(w.message) for w in caught if "apt_kernels" in str(w.message)]
assert len(said) == 1 and "{module}.{kind}.{name}" in said[0], said
if "{name}" == "_setup_prompt_encoder":
    model = peft.get_peft_model(models.build("llama"), peft.LoraConfig(target_modules="all-linear"))
    try:
        apt_kernels.patch(model)
    except apt_kernels.PatchError as error:
        assert "{name}" in str(error), error
    else:
        raise AssertionError("a model with a LoRA was patched")
"""


@pytest.mark.parametrize("first", ["patch", "import"])
@pytest.mark.parametrize(
    ("module", "kind", "name"),
    [
        ("peft.tuners.tuners_utils", "BaseTuner", "inject_adapter"),
        ("peft.peft_model", "PeftModel", "_setup_prompt_encoder"),
        ("peft.peft_model", "PeftModel", "load_adapter"),
    ],
)
def test_import_peft_warns_and_never_raises(module, kind, name, first):
    pytest.importorskip("peft", reason="the package peft is not installed")
    code = IMPORT_PEFT.format(module=module, kind=kind, name=name, first=first)
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_import_from_inside_transformers_or_peft_goes_unlisted():
    modules = ("masking_utils", "modeling_layers")
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            inside = isinstance(node, ast.ImportFrom) and not node.level and node.module
            if inside and node.module.split(".")[0] in ("transformers", "peft") and "." in node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                found.add(f"transformers.{node.value.id}.{node.attr}")
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
    wanted |= {name for x in compat.FEATURES.values() for found in x.instances.values() for name in found}
    unlisted = {name: used[name] for name in private - ours - wanted - ELSEWHERE if "_apt" not in name}
    assert unlisted == {}
