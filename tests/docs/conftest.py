"""Tiny models in place of those that the documentation names."""

import hashlib
import inspect
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ContinuousBatchingConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers import documentation, exported_caches

_SIZE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
SMALL_CACHE = f"__import__('transformers').ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, {_SIZE}=8)"

SLOTS = 1 << 15  # tokens of the tiny models


@pytest.fixture(autouse=True)
def caches_as_before():
    """An example registers transformers' caches with torch, for the whole process."""
    yield
    exported_caches.forget()


@pytest.fixture(scope="session")
def substitutions(tmp_path_factory) -> list[tuple[str, str]]:
    """Text of the documentation, and its replacement when the code runs."""
    root = tmp_path_factory.mktemp("models")
    words = {word for page in documentation.PAGES for word in page.read_text(encoding="utf-8").split()}
    for path in documentation.NOTEBOOKS:  # texts in quotes
        words |= set(re.findall(r"[\w.?]+", path.read_text(encoding="utf-8")))
    words = sorted(words)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    size["vocab_size"] = SLOTS
    torch.manual_seed(0)
    # Random weights large enough to separate texts: 20 steps at 1e-2 then end below 0.1, at 5e-5 above 0.5.
    text = {"initializer_range": 0.15, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertForSequenceClassification(BertConfig(**size, max_position_embeddings=64, **text))
    qwen = Qwen3ForCausalLM(Qwen3Config(**size, num_key_value_heads=2, head_dim=16))
    for name, model in (("bert", bert), ("qwen3", qwen)):
        tokenizer = Tokenizer(models.WordLevel(vocabulary(words), unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}  # TRL needs an end
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        wrapped.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        wrapped.save_pretrained(root / name)
        model.save_pretrained(root / name)
    return [
        ('"bert-base-uncased"', repr(str(root / "bert"))),
        ('"Qwen/Qwen3-0.6B"', repr(str(root / "qwen3"))),
        # The tiny BERT has two layers.
        ("(16,) * 6 + (0,) * 6", "(16, 0)"),
        # Two rows take the place of a data set.
        ("train_dataset=data,", "train_dataset=[dict(input_ids=[5, 6, 7], labels=i) for i in (0, 1)],"),
        # One graph is what is tested; inductor takes a minute to compile it.
        ("torch.compile(model, ", 'torch.compile(model, backend="eager", '),
        # By default the paged cache uses most of the memory.
        (
            "generate_batch(prompts, ",
            f"generate_batch(prompts, continuous_batching_config={SMALL_CACHE}, generation_config=",
        ),
    ]


def vocabulary(words: list[str]) -> dict[str, int]:
    """Numbers by the hashes of words: a new word on a page changes neither weights nor the other words' numbers."""
    numbers = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    taken = set(numbers.values())
    for word in words:
        number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % SLOTS
        while number in taken:
            number = (number + 1) % SLOTS
        taken.add(number)
        numbers[word] = number
    return numbers
