"""A batch whose rows use different adapters, against one adapter, one adapter after the other, and PEFT's LoRA.

    python -m bench mixtures [--adapters 1 4 16 64] [--rounds 20] [--length 16] [--rank 8]

A Llama of 4 layers (width 256, 8 query heads, 4 key heads), 64 rows. Two passes: a forward of 32 tokens, and greedy
generation of 8 tokens after them. In turn, in one process, on one thread:

- ``one adapter``: all rows use the active adapter, no names are given;
- ``mixed``: ``adapter_names`` divides the rows evenly among the adapters;
- ``one after the other``: a call for each adapter with its rows;
- ``PEFT, one LoRA`` and ``PEFT, mixed LoRA``: the same with ``lora`` on the query and value projections.

The mixed results are compared with those of one after the other before anything is timed. The table has medians and
quartiles of the ratio to ``one adapter`` (PEFT: to ``one LoRA``) of the same round, and the bytes of an adapter.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import apt_kernels
from bench.common.machine import conditions
from bench.common.markdown import markdown

from .models import with_same_weights
from .timing import in_turn

ADAPTERS = (1, 4, 16, 64)
ROWS, TOKENS, NEW, VOCABULARY = 64, 32, 8, 1000
PASSES = ("forward", "generation")
OURS, PEFT = "one adapter", "PEFT, one LoRA"
# How far float32 results of the same rows in another batch may be apart, relative to their largest value.
CLOSE = 1e-4


def base_model(layers: int = 4) -> nn.Module:
    """The unpatched model, in evaluation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, num_hidden_layers=layers)).eval()


def names_of(count: int) -> list[str]:
    return [f"a{i}" for i in range(count)]


def patched(base: nn.Module, count: int, length: int) -> nn.Module:
    """A copy of the model with ``count`` adapters of the default gate, the first of them active."""
    model = apt_kernels.patch(with_same_weights(base), prefix_length=length, init="normal", init_seed=0)
    for i, name in enumerate(names_of(count)):
        apt_kernels.add_adapter(model, name, prefix_length=length, init="normal", init_std=0.5, init_seed=i)
    apt_kernels.set_adapter(model, "a0")
    apt_kernels.delete_adapter(model, "default")
    return model.eval()


def with_lora(base: nn.Module, count: int, rank: int) -> nn.Module:
    """PEFT's model with ``count`` adapters that have an effect."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
    for name in names_of(count)[1:]:
        model.add_adapter(name, config)
    return model.eval()


def call(model: nn.Module, which: str, ids: Tensor, names: list[str] | None) -> Tensor:
    """The logits of a forward, or the generated tokens."""
    given = {} if names is None else {"adapter_names": names}
    if which == "forward":
        return model(input_ids=ids, **given).logits
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **given)


def calls(ours: nn.Module, lora: nn.Module | None, which: str, ids: Tensor, count: int) -> dict[str, Callable]:
    """What is timed, by name."""
    order = names_of(count)
    names = [order[row * count // len(ids)] for row in range(len(ids))]
    parts = [(name, [row for row, each in enumerate(names) if each == name]) for name in order]

    def apart():
        return torch.cat([call(ours, which, ids[rows], [name] * len(rows)) for name, rows in parts if rows])

    found = {
        OURS: lambda: call(ours, which, ids, None),
        "mixed": lambda: call(ours, which, ids, names),
        "one after the other": apart,
    }
    if lora is not None:
        found[PEFT] = lambda: call(lora, which, ids, None)
        found["PEFT, mixed LoRA"] = lambda: call(lora, which, ids, names)
    return found


def check(made: dict[str, Callable], which: str) -> None:
    """Raise unless the mixed batch has the results of one adapter after the other."""
    mixed, apart = made["mixed"](), made["one after the other"]()
    if which == "forward":
        error = ((mixed - apart).abs().max() / apart.abs().max()).item()
    else:
        # Greedy choices of float32 logits that are almost equal may differ.
        error = CLOSE * (mixed != apart).any(dim=1).float().mean().item() / 0.05
    if not error <= CLOSE:
        raise RuntimeError(f"{which}: the mixed batch differs from one adapter after the other by {error:.2g}")


@torch.no_grad()
def measure(count: int, length: int, rank: int, rounds: int) -> dict:
    """Seconds of every round by pass and call, and the bytes of an adapter of ours and of LoRA."""
    base, cpu = base_model(), torch.device("cpu")
    ours, lora = patched(base, count, length), with_lora(base, count, rank)
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    found: dict = {"bytes": {"prefix": size_of(ours), "LoRA": size_of(lora)}}
    for which in PASSES:
        made = calls(ours, lora, which, ids, count)
        check(made, which)
        runners = {name: timed(run) for name, run in made.items()}
        found[which] = in_turn(runners, cpu, deadline=0, warm_up=1, least=rounds, most=rounds)
    return found


def size_of(model: nn.Module) -> int:
    """Bytes of the active adapter's parameters."""
    own = (p for name, p in model.named_parameters() if ".apt." in name or ".a0." in name)
    return sum(p.numel() * p.element_size() for p in own)


def timed(run: Callable) -> Callable[[int], dict[str, float]]:
    def sample(_: int) -> dict[str, float]:
        begin = time.thread_time()
        run()
        return {"call": time.thread_time() - begin}

    return sample


def ratios(samples: dict[str, dict[str, list[float]]]) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of each call's time relative to that of one adapter in the same round."""
    taken = {name: torch.tensor(each["call"], dtype=torch.float64) for name, each in samples.items()}
    at, found = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64), {}
    for name, each in taken.items():
        to = taken[PEFT if name.startswith("PEFT") else OURS]
        median, first, third = (each / to).quantile(at).tolist()
        found[name] = median, first, third
    return found


def main(given: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench mixtures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", nargs="+", type=int, default=ADAPTERS, help="how many in a batch (1, 4, 16, 64)")
    parser.add_argument("--rounds", type=int, default=20, help="of each case (20)")
    parser.add_argument("--length", type=int, default=16, help="prefix tokens (16)")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA (8)")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    lines = []
    for count in options.adapters:
        found = measure(count, options.length, options.rank, options.rounds)
        for which in PASSES:
            taken = {name: torch.tensor(each["call"]).median().item() for name, each in found[which].items()}
            for name, (median, first, third) in ratios(found[which]).items():
                row = f"{taken[name] * 1e3:.1f}", f"{median:.2f} ({first:.2f} to {third:.2f})"
                lines.append((which, str(count), name, *row))
    print(markdown(("pass", "adapters", "call", "ms", "relative to one adapter: median (quartiles)"), lines))
    sizes = ", ".join(f"{name} {size:,} bytes" for name, size in found["bytes"].items())
    settings = f"{options.rounds} rounds, {ROWS} rows, prefix {options.length}, LoRA rank {options.rank}"
    print(f"\nAn adapter's parameters: {sizes}.")
    print(conditions(settings))
    return 0
