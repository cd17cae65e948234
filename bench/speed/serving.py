"""What an adapter costs in vLLM on the CPU: time to the first token, and tokens per second.

    make bench-vllm        # this command, in the environment of `make test-vllm`

Four engines, one without an adapter and one for each prefix length, answer the same requests in turn, each in a process
of its own. Before that, their greedy tokens are compared with those of transformers. The model is SmolLM2-135M-Instruct
in float32, the gate is per token. "Allowed" is the model's arithmetic with the prefix divided by that without, and 5%.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import apt_kernels
from bench.common import machine
from bench.common.markdown import markdown
from bench.quality import packaged

from .tables import statistics_of
from .timing import in_turn

LENGTHS = (16, 64, 512)
WITHOUT = "no adapter"
# Tokens of the prompt whose first token is timed; prompts, their tokens and new tokens of a batch.
PROMPT, BATCH = 512, (8, 128, 32)
PASSES = ("first token", "batch")
# What an adapter may cost beside its arithmetic.
ALLOWED = 1.05


def arithmetic(config, tokens: int, keys: float, length: int) -> float:
    """Multiply-adds of ``tokens`` tokens that see ``keys`` keys each and ``length`` prefix tokens, gates per token."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = config.head_dim * (heads + config.num_key_value_heads) * 2
    layer = hidden * (width + 3 * config.intermediate_size) + 2 * heads * config.head_dim * (keys + length)
    return tokens * config.num_hidden_layers * (layer + hidden * length)


def over(config, which: str, length: int) -> float:
    """Arithmetic with a prefix over that without; the head of the vocabulary computes one token of each request."""
    rows, prompt, new = (1, PROMPT, 1) if which == "first token" else BATCH
    head = rows * new * config.hidden_size * config.vocab_size
    # The last new token is not read again.
    tokens, keys = prompt + new - 1, (prompt + new) / 2
    with_prefix, without = (rows * arithmetic(config, tokens, keys, m) + head for m in (length, 0))
    return with_prefix / without


@contextmanager
def engines(model: Path, adapters: dict[str, Path | None]) -> Iterator[dict]:
    """An engine for each adapter, each in processes of its own."""
    from vllm import LLM

    found = {}
    try:
        for name, adapter in adapters.items():
            ours = {"load_format": "apt_kernels", "model_loader_extra_config": {"adapter": str(adapter)}}
            found[name] = LLM(
                model=str(model), dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=BATCH[0],
                enable_prefix_caching=False, skip_tokenizer_init=True, seed=0, **(ours if adapter else {}),
            )  # fmt: skip
        yield found
    finally:
        for engine in found.values():
            engine.llm_engine.engine_core.shutdown()


def prompts(rows: int, length: int, seed: int) -> list[dict]:
    """Random requests, from tokens that are no special ones."""
    drawn = torch.randint(100, 40_000, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"prompt_token_ids": row} for row in drawn.tolist()]


def answers(engine, requests: list[dict], new: int) -> list[list[int]]:
    """Greedy tokens."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    return [list(done.outputs[0].token_ids) for done in engine.generate(requests, settings, use_tqdm=False)]


@torch.no_grad()
def check(engine, model: Path, adapter: Path | None, new: int = 8) -> None:
    """Raise unless an engine's greedy tokens are those of transformers with the adapter."""
    from transformers import AutoModelForCausalLM

    requests, expected = prompts(2, 40, seed=7), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if adapter:
        apt_kernels.load(expected, adapter)
    ids = torch.tensor([request["prompt_token_ids"] for request in requests])
    made = expected.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
    )
    if answers(engine, requests, new) != made[:, ids.shape[1] :].tolist():
        raise RuntimeError(f"vLLM with the adapter {adapter} does not give the tokens of transformers")


def runner(engine) -> Callable[[int], dict[str, float]]:
    """Seconds of both passes in a round."""

    def sample(round_: int) -> dict[str, float]:
        rows, length, new = BATCH
        begin = time.perf_counter()
        answers(engine, prompts(1, PROMPT, seed=round_), 1)
        between = time.perf_counter()
        answers(engine, prompts(rows, length, seed=round_), new)
        return {"first token": between - begin, "batch": time.perf_counter() - between}

    return sample


def table(found: dict) -> str:
    """The results as Markdown: medians, and ratios within a round with their quartiles."""
    lines = []
    for name, each in found["engines"].items():
        seconds = {which: each[which]["seconds"]["median"] for which in PASSES}
        cells = [name, f"{seconds['first token'] * 1e3:.0f}", f"{BATCH[0] * BATCH[2] / seconds['batch']:.0f}"]
        for which in PASSES:
            ratio, allowed = each[which]["ratio"], each[which]["arithmetic"] * ALLOWED
            shown = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}); {allowed:.2f}"
            cells.append("" if name == WITHOUT else shown)
        lines.append(cells)
    header = "adapter", "first token, ms", "tokens/s", "time to first token / no adapter; allowed"
    return markdown((*header, "time of a batch / no adapter; allowed"), lines)


def measure(rounds: int) -> dict:
    """Every engine's seconds and its ratios to the engine without an adapter, with the machine."""
    base, _ = packaged.smollm2(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model, adapters = Path(folder, "base"), {WITHOUT: None}
        base.save_pretrained(model)
        for length in LENGTHS:
            apt_kernels.patch(base, prefix_length=length)
            adapters[f"prefix {length}"] = Path(folder, str(length))
            apt_kernels.save(base, adapters[f"prefix {length}"])
            apt_kernels.unpatch(base)
        with engines(model, adapters) as running:
            for name, engine in running.items():
                check(engine, model, adapters[name])
            runners = {name: runner(engine) for name, engine in running.items()}
            taken = in_turn(runners, torch.device("cpu"), deadline=0, warm_up=1, least=rounds, most=rounds)
    found: dict = {"machine": machine.machine(torch.device("cpu")), "commit": machine.commit(), "engines": {}}
    found["machine"]["versions"]["vllm"] = importlib.import_module("vllm").__version__
    for length, (name, each) in zip((0, *LENGTHS), taken.items(), strict=True):
        found["engines"][name] = {
            which: {
                "seconds": statistics_of(each[which]),
                "ratio": statistics_of([a / b for a, b in zip(each[which], taken[WITHOUT][which], strict=True)]),
                "arithmetic": over(base.config, which, length),
            }
            for which in PASSES
        }
    return found


def main(given: list[str] | None = None) -> int:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m bench serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="of requests to every engine (7)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(given)
    if importlib.util.find_spec("vllm") is None:
        sys.exit("python -m bench serving: vLLM is not installed here. Run `make bench-vllm`.")
    found = measure(options.rounds)
    print(table(found), machine.conditions(f"{options.rounds} rounds"), sep="\n\n")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0
