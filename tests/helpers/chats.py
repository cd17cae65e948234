"""A tokeniser of whole words with a chat template, for tiny models."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} <e> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(words: str, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """The tokeniser of these words, in their order; ``<pad>``, ``<unk>`` and ``<e>`` come first."""
    known = dict.fromkeys(["<pad>", "<unk>", "<e>", *"system user assistant :".split(), *words.split()])
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<e>")
    wrapped.chat_template = template
    return wrapped
