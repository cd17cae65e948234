"""Host time of a decoding step: what a prefix adds to each layer of a model that is too small for its arithmetic.

    python -m bench decoding [--rounds 300] [--length 16] [--prompt 8] [--gates token first]

A Llama of 8 layers, hidden size 64, 4 query heads and 2 key heads decodes one token for each row after a prompt,
without a patch and with every gate, in turn, in one process; the cache is set back to the prompt after each step.
Microseconds for each layer: the unpatched step, then how much longer a patched step takes. The clock is the thread's
own time on a core, with one thread, so that other processes on the machine count less. The first figure is the
difference of the fifth percentiles; then the median and the quartiles of the differences within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

import apt_kernels
from bench.common.machine import conditions
from bench.common.markdown import markdown

from .models import with_same_weights
from .timing import in_turn

GATES = ("none", "static", "first", "token")
CACHES = ("dynamic", "static")
ROWS = (1, 8)
LAYERS = 8
VOCABULARY = 64


def model() -> nn.Module:
    """The unpatched model, in evaluation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, num_hidden_layers=LAYERS, attn_implementation="sdpa")
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def models(gates: tuple[str, ...], length: int) -> dict[str, nn.Module]:
    """The unpatched model, and one with the same weights for each gate; gate ``none`` has no layer scale either."""
    base = model()
    found = {"unpatched": base}
    for gate in gates:
        start = {"init": "normal", "init_seed": 0}
        found[gate] = apt_kernels.patch(
            with_same_weights(base), prefix_length=length, gate=gate, layer_scale=gate != "none", **start
        ).eval()
    return found


def decoder(model: nn.Module, cache: str, rows: int, prompt: int) -> tuple[Callable[[], object], Callable[[], None]]:
    """A step of decoding after ``prompt`` tokens, and a function that sets the cache back to the prompt."""
    from transformers import DynamicCache, StaticCache

    ids = torch.randint(5, VOCABULARY, (rows, prompt + 1), generator=torch.Generator().manual_seed(1))
    made = DynamicCache(config=model.config)
    if cache == "static":
        made = StaticCache(config=model.config, max_cache_len=prompt + 8)
    token = ids[:, prompt:]

    def step():
        return model(token, past_key_values=made, use_cache=True).logits

    def back():
        if cache == "dynamic":
            made.crop(-1)
            return
        for layer in made.layers:
            layer.cumulative_length.fill_(prompt)

    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=made, use_cache=True)
    return step, back


@torch.no_grad()
def measure(cache: str, rows: int, gates: tuple[str, ...], length: int, prompt: int, rounds: int) -> dict:
    """Seconds of every round's step by model, ``"unpatched"`` and the gates."""

    def runner(step, back):
        def run(_: int) -> dict[str, float]:
            begin = time.thread_time()
            step()
            taken = time.thread_time() - begin
            back()
            return {"token": taken}

        return run

    made = {name: runner(*decoder(each, cache, rows, prompt)) for name, each in models(gates, length).items()}
    found = in_turn(made, torch.device("cpu"), float("inf"), warm_up=10, most=rounds)
    return {name: samples["token"] for name, samples in found.items()}


def figures(samples: dict[str, list[float]]) -> dict[str, tuple[float, ...]]:
    """Microseconds for each layer: of the unpatched step its fifth percentile, median and quartiles; of every other
    model what it adds."""
    taken = {name: torch.tensor(each, dtype=torch.float64) / LAYERS * 1e6 for name, each in samples.items()}
    base, at = taken["unpatched"], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    found = {}
    for name, each in taken.items():
        more = each if name == "unpatched" else each - base
        low = each.quantile(0.05) - (0 if name == "unpatched" else base.quantile(0.05))
        first, median, third = more.quantile(at).tolist()
        found[name] = float(low), median, first, third
    return found


def main(given: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench decoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300, help="steps of each model (300)")
    parser.add_argument("--length", type=int, default=16, help="prefix tokens (16)")
    parser.add_argument("--prompt", type=int, default=8, help="tokens in the cache (8)")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=GATES)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="of the batch (1 and 8)")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    lines = []
    for cache in options.caches:
        for rows in options.rows:
            samples = measure(cache, rows, options.gates, options.length, options.prompt, options.rounds)
            for name, (low, median, first, third) in figures(samples).items():
                said = "unpatched" if name == "unpatched" else f"gate {name}, more"
                lines.append((cache, str(rows), said, f"{low:.0f}", f"{median:.0f} ({first:.0f} to {third:.0f})"))
    print(markdown(("cache", "rows", "step", "fifth percentile", "median (quartiles)"), lines))
    settings = f"{options.rounds} rounds, prefix {options.length}, prompt {options.prompt}"
    print(f"\n{conditions(settings)}")
    return 0
