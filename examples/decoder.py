"""A prefix for a decoder model: begin as a text, train, look at the gates, prune, save, load, generate.

    python examples/decoder.py                                  # a tiny Llama, made on the spot; no hub
    python examples/decoder.py --model Qwen/Qwen3-0.6B --text notes.txt

The task: the model shall continue a text as if it had read it. The prefix begins as the keys and values of the text's
first tokens (exactly: the first line that is printed shows it) and trains on the whole text.
"""

from __future__ import annotations

import argparse
import itertools
import string
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import apt_kernels

TINY = "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=TINY, help="a hub name or folder (default: a tiny Llama, made here)")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a text file (default: this script)")
    parser.add_argument("--prefix-length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=64, help="tokens of a training window")
    given = parser.parse_args()

    torch.manual_seed(0)
    ids, build, decode = tiny(given.text) if given.model == TINY else pretrained(given.model, given.text)
    model = build()
    start = ids[: given.prefix_length]

    # 1. The text's first tokens as the prefix: the patched model is an exact copy of the model that reads them first.
    rest = ids[given.prefix_length :][None, : given.length]
    with torch.no_grad():
        read = model(torch.cat([start[None], rest], dim=1)).logits[:, len(start) :]
        apt_kernels.patch_from_text(model, start)
        apart = (model(rest).logits - read).abs().max().item()
    print(f"1. the prefix is the text's first {len(start)} tokens: logits differ by {apart:.1e}")

    # 2. Train: the base is frozen, any optimizer and any loop will do.
    optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(model))
    print(f"2. {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters train")
    before = loss_of(model, ids, given.length)
    model.train()
    for windows in itertools.islice(batches(ids, given.length), given.steps):
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = loss_of(model, ids, given.length)
    print(f"   loss over the text: {before:.3f} before, {after:.3f} after {given.steps} steps")

    # 3. What the gates learned.
    probe = apt_kernels.probe(model, [{"input_ids": windows} for windows in itertools.islice(batches(ids, 64), 2)])
    print(f"3. weights of the prefix\n\n{probe.table()}\n")

    # 4. Half of the prefix, by its weights.
    lengths = probe.lengths(budget=sum(layer.length for layer in probe.layers) // 2)
    apt_kernels.prune(model, lengths)
    pruned = loss_of(model, ids, given.length)
    print(f"4. pruned to {list(lengths)} tokens: loss {pruned:.3f}")

    # 5. Only the prefix is saved; a fresh model takes it and generates.
    with tempfile.TemporaryDirectory() as folder:
        apt_kernels.save(model, folder)
        again = apt_kernels.load(build(), folder)
    prompt = rest[:, :16]
    out = again.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    same = torch.equal(out, model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0))
    print(f"5. saved and loaded, it generates the same: {same}\n   {decode(out[0])!r}")


def batches(ids: Tensor, length: int, size: int = 8):
    """Random windows of the text, ``[size, length]``."""
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(max(1, len(ids) - length), (size,), generator=generator)
        yield torch.stack([ids[i : i + length] for i in starts.tolist()])


@torch.no_grad()
def loss_of(model, ids: Tensor, length: int) -> float:
    windows = next(batches(ids, length, 32))
    return model.eval()(input_ids=windows, labels=windows).loss.item()


def pretrained(name: str, text: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    return ids, lambda: AutoModelForCausalLM.from_pretrained(name).eval(), tokenizer.decode


def tiny(text: Path):
    """A Llama of 2 layers over characters, trained for a moment on Python's own ``string`` module."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {character: i for i, character in enumerate(string.printable)}

    def encode(path: Path) -> Tensor:
        return torch.tensor([known[c] for c in path.read_text(encoding="utf-8") if c in known])

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(known), **shape, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for windows in itertools.islice(batches(encode(Path(string.__file__)), 64), 80):
        optimizer.zero_grad()
        base(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()

    def build():
        model = LlamaForCausalLM(base.config)
        model.load_state_dict(base.state_dict())
        return model.eval()

    return encode(text), build, lambda ids: "".join(string.printable[i] for i in ids.tolist())


if __name__ == "__main__":
    main()
