"""A decoder with LoRA beside the prefix: train both, save both in one folder, load both. Needs `peft`.

python examples/lora.py                                 # a tiny Llama, made on the spot; no hub
python examples/lora.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import tempfile

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import apt_kernels

TEXTS = ["a prefix is a short memory.", "attention reads it at every token.", "LoRA changes the weights beside it."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=tiny.NAME, help="a hub name or folder (default: a tiny Llama, made here)")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()

    base, tokenizer = tiny.load(given.model)
    apt_kernels.patch(base, prefix_length=16, init_seed=0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    # LoRA's rate is `head_lr`, that of everything beside the prefixes.
    optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(model, lr=1e-2, head_lr=1e-3))
    for group in optimizer.param_groups:
        print(f"{group['name']}: {sum(p.numel() for p in group['params']):,} parameters at {group['lr']}")

    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    given_tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    losses = []
    for _ in range(given.steps):
        loss = model(**given_tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {given.steps} steps")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.eval().save_pretrained(folder)  # the LoRA and the prefix
        fresh = PeftModel.from_pretrained(tiny.load(given.model)[0], folder).eval()
        same = torch.equal(fresh(**given_tokens).logits, model(**given_tokens).logits)
    print(f"saved and loaded, it computes the same: {same}")


if __name__ == "__main__":
    main()
