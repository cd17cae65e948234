"""A prefix for a decoder by TRL: supervised fine-tuning, then DPO with the result as the reference. Needs `trl`.

    python examples/sft_dpo.py                              # a tiny Llama, made on the spot; no hub
    python examples/sft_dpo.py --model Qwen/Qwen3-0.6B

The task: answer sums. In DPO the right answer is preferred to a wrong one; the reference is the adapter that the
fine-tuning made, on the weights of the same base model.
"""

from __future__ import annotations

import argparse
import tempfile

import tiny
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import apt_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=tiny.NAME, help="a hub name or folder (default: a tiny Llama, made here)")
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--base-reference", action="store_true", help="the base model as DPO's reference")
    given = parser.parse_args()

    model, tokenizer = tiny.load(given.model)
    apt_kernels.patch(model, prefix_length=16, init_seed=0)
    with tempfile.TemporaryDirectory() as folder:
        shared = {"output_dir": folder, "max_steps": given.steps, "per_device_train_batch_size": 8, "logging_steps": 1}
        shared |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False}

        # 1. Fine-tuning. TRL's default rate is for all weights: the optimizer has the prefixes' rate.
        optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(model))
        texts = Dataset.from_dict({"text": [question + right for question, right, _ in sums()]})
        trainer = SFTTrainer(
            model,
            args=SFTConfig(**shared),
            train_dataset=texts,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.train()
        losses = logged(trainer)
        print(f"1. SFT: loss {losses[0]:.3f} before, {losses[-1]:.3f} after {given.steps} steps")

        # 2. The reference: the adapter as it is now, on the weights of the same base model.
        reference = apt_kernels.reference_model(model, prefix=not given.base_reference)
        own = {p.data_ptr(): p.numel() for p in reference.parameters()}
        shared_with = {p.data_ptr() for p in model.parameters()}
        extra = sum(size for pointer, size in own.items() if pointer not in shared_with)
        print(f"2. the reference adds {extra:,} parameters to {sum(p.numel() for p in model.parameters()):,}")

        # 3. DPO.
        optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(model, lr=3e-3))
        columns = zip(*sums())
        trainer = DPOTrainer(
            model,
            ref_model=reference,
            args=DPOConfig(**shared),
            train_dataset=Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), columns))),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.train()
        losses = logged(trainer)
        print(f"3. DPO: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} after {given.steps} steps")


def sums() -> list[tuple[str, str, str]]:
    """Questions, right and wrong answers."""
    return [(f"{a} + {b} =", f" {a + b}", f" {a + b + 1}") for a in range(8) for b in range(8)]


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
