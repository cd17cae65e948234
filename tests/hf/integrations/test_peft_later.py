"""PEFT imported after the patch, and the methods of PEFT that freeze a model."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import apt_kernels
from helpers import models
from helpers.patched import randomise

TESTS = Path(__file__).parents[2]
LATER = """
import sys, torch, apt_kernels
from helpers import models
from helpers.patched import randomise
model = apt_kernels.patch(models.build("llama").double(), prefix_length=3).double()
randomise(model)
assert "peft" not in sys.modules
given = models.inputs("llama", "right")
with torch.no_grad(), apt_kernels.disabled(model):
    without = model(**given).logits
import peft
lora = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
trained = {n for n, p in model.named_parameters() if p.requires_grad}
ours = {n for n in trained if ".apt." in n}
assert ours and trained - ours and all("lora_" in n for n in trained - ours), trained
logits = model(**given).logits
assert (logits - without).abs().max() > 1e-2
logits.square().mean().backward()
assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
model.merge_adapter()
torch.testing.assert_close(model(**given).logits, logits)
model.unmerge_adapter()
merged = model.merge_and_unload()
torch.testing.assert_close(merged(**given).logits, logits)
assert all(p.requires_grad for x in apt_kernels.prefixes(merged).values() for p in x.parameters())
"""


@pytest.mark.proves("LoRA and other PEFT methods on the same model, patched before or after, merged and unmerged")
@pytest.mark.parametrize("family", ["llama"])
def test_peft_imported_after_the_patch(family):
    code = LATER.replace('"llama"', repr(family))
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


LOADED = """
import torch, warnings
warnings.simplefilter("error", UserWarning)  # "apt_kernels cannot work beside this ..."
{imports}
import peft
assert ("apt_kernels.hf" in __import__("sys").modules) == ({imports!r}.count("apt_kernels.hf") > 0)
from helpers import models
model = models.build("bert")
given = models.inputs("bert")
peft.PeftModel.from_pretrained(model, {folder!r})
with torch.no_grad():
    torch.save(model.eval()(**given)[0], {out!r})
"""


# Some ask whether PEFT is installed (importlib.util.find_spec), some import it while they are imported themselves.
@pytest.mark.parametrize(
    "imports",
    [
        "import peft, apt_kernels",
        "import apt_kernels, importlib.util\nassert importlib.util.find_spec('peft')\nimport transformers.trainer",
        "import apt_kernels, sentence_transformers",
        "import apt_kernels.hf, trl.trainer.dpo_trainer",
    ],
)
def test_a_new_process_loads_the_prefix_beside_a_lora(imports, beside_a_lora, tmp_path):
    """Nothing but PEFT's own function is called there."""
    folder, expected = beside_a_lora
    out = tmp_path / "out.pt"
    code = LOADED.format(imports=imports, folder=str(folder), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(out, weights_only=True), expected)


@pytest.fixture(scope="module")
def beside_a_lora(tmp_path_factory):
    """A folder with a prefix and a LoRA, and the model's output with both."""
    folder = tmp_path_factory.mktemp("both")
    model = apt_kernels.patch(models.build("bert"), prefix_length=3)
    both = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    randomise(model)
    both.save_pretrained(folder)
    with torch.no_grad():
        return folder, model.eval()(**models.inputs("bert"))[0]


def ours_trainable(model) -> bool:
    return all(p.requires_grad for prefix in apt_kernels.prefixes(model).values() for p in prefix.parameters())


def prompt_tuning(model):
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def own_integration(model):
    model.add_adapter(peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    return model


def kbit(model):
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@pytest.mark.proves("LoRA and other PEFT methods on the same model, patched before or after, merged and unmerged")
@pytest.mark.parametrize("change", [prompt_tuning, own_integration, kbit])
@pytest.mark.parametrize("family", ["llama"])
def test_whatever_freezes_leaves_the_prefix(family, change):
    base = apt_kernels.patch(models.build(family), prefix_length=3)
    randomise(base)
    changed = change(base)
    assert ours_trainable(base)
    given = models.inputs(family)
    logits = changed(**given).logits
    with torch.no_grad(), apt_kernels.disabled(base):
        assert (changed(**given).logits - logits).abs().max() > 1e-2, "the prefix has no influence"
    logits.square().mean().backward()
    found = {n: p.grad for n, p in changed.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
    assert not any(p.requires_grad for n, p in base.named_parameters() if ".apt." not in n and "lora_" not in n)
