"""What a type checker says of calls of the package; never run.

`test_typing.py` reads the comments: ``R``, a revealed type; ``E``, the beginning of an error.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import BertForSequenceClassification, LlamaForCausalLM
from typing_extensions import reveal_type

import apt_kernels
from apt_kernels import AptConfig, Mask
from apt_kernels.ops import choose


def settings(llama: LlamaForCausalLM, bert: BertForSequenceClassification) -> None:
    reveal_type(apt_kernels.patch(llama))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.patch(bert, gate="first"))  # R: BertForSequenceClassification
    apt_kernels.patch(llama, AptConfig(prefix_length=[4, 0, 4]), example_inputs={"input_ids": torch.ones(1, 4)})
    apt_kernels.patch(llama, prefix_length=(4, 0), layers="decoder", trainable=["head"], reparameterisation=None)
    apt_kernels.patch(llama, None)
    apt_kernels.patch(llama, prefix_lenght=16)  # E: Unexpected keyword argument "prefix_lenght" for "patch"
    apt_kernels.patch(llama, gate="tokn")  # E: Argument "gate" to "patch" has incompatible type
    apt_kernels.patch(llama, prefix_length="16")  # E: Argument "prefix_length" to "patch" has incompatible type
    apt_kernels.patch(llama, layer_scale=2.0)  # E: Argument "layer_scale" to "patch" has incompatible type
    apt_kernels.patch("llama")  # E: Value of type variable "Model" of "patch" cannot be "str"
    AptConfig(gate="tokn")  # E: Argument "gate" to "AptConfig" has incompatible type
    AptConfig(prefix_lenght=16)  # E: Unexpected keyword argument "prefix_lenght" for "AptConfig"


def adapters(llama: LlamaForCausalLM, folder: Path) -> None:
    reveal_type(apt_kernels.load(llama, folder))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.unpatch(llama))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.add_adapter(llama, "b", gate="static"))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.set_adapter(llama, "b"))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.delete_adapter(llama, "b"))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.compose(llama, ["b", "c"], "d"))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.prefixes(llama))  # R: dict[str, AdaptivePrefix]
    reveal_type(apt_kernels.adapters(llama))  # R: dict[str, AptConfig]
    apt_kernels.save(llama, "folder")
    apt_kernels.load(llama, 3)  # E: Argument 2 to "load" has incompatible type
    apt_kernels.load(llama)  # E: Missing positional argument "folder" in call to "load"
    apt_kernels.add_adapter(llama, "b", gate="tokn")  # E: Argument "gate" to "add_adapter" has incompatible type
    with apt_kernels.disabled(llama) as model:
        reveal_type(model)  # R: LlamaForCausalLM


def probing(llama: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> None:
    found = apt_kernels.probe(llama, batches)
    reveal_type(found)  # R: Probe
    reveal_type(apt_kernels.prune(llama, found.lengths(budget=64)))  # R: LlamaForCausalLM
    reveal_type(apt_kernels.patch_from_text(llama, [1, 2, 3]))  # R: LlamaForCausalLM
    apt_kernels.probe(llama, batches, progress="no")  # E: Argument "progress" to "probe" has incompatible type
    apt_kernels.probe(llama)  # E: Missing positional argument "batches" in call to "probe"
    apt_kernels.prune_all(llama)  # E: Module has no attribute "prune_all"


def the_op(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> None:
    reveal_type(apt_kernels.attention(q, k, v, p, p))  # R: Tensor
    reveal_type(apt_kernels.attention(q, k, v, p, p, None, 2.0, mask=Mask(causal=True)))  # R: Tensor
    reveal_type(apt_kernels.attention(q, k, v, p, p, return_logsumexp=True))  # R: tuple[Tensor, Tensor]
    reveal_type(apt_kernels.selected(q, k, v, p, p).strategy)  # R: str
    apt_kernels.attention(q, k, v, p, p, is_causal=True)  # E: Unexpected keyword argument "is_causal"
    apt_kernels.attention(q, k, v)  # E: No overload variant of "attention" matches
    Mask(causal="no")  # E: Argument "causal" to "Mask" has incompatible type "str"; expected "bool"
    Mask(query_offset=1.5)  # E: Argument "query_offset" to "Mask" has incompatible type "float"
    reveal_type(choose.load("cpu"))  # R: Backend
