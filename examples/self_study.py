"""Self-study: a short prefix learns to answer questions about a text as the model does that has read the text.

    python examples/self_study.py                                    # SmolLM2 from the hub, a text of this repository
    python examples/self_study.py --model Qwen/Qwen3-0.6B --text notes.txt --ask "Who wrote this?"

1. The model reads the text (in chunks, as a prefix that is an exact copy of it), and asks and answers questions.
2. A shorter prefix starts as the first tokens of the text, and learns the next-token distributions of these answers.
3. Held-out conversations show how far the short prefix is from the text, before and after.

Nobody writes an answer: the model that reads the text is the teacher. An interrupted run continues where it was saved
if it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

import apt_kernels

ROOT = Path(__file__).resolve().parents[1]
BASE, TEXT, STUDY = "__base__", "text", "default"  # names of adapters: none, the whole text, the one that trains
# What the model that reads the text is told; each gives other questions.
SEEDS = (
    "Ask one short question about a name in the text above.",
    "Ask one short question about a number or a date in the text above.",
    "Ask one short question about a place in the text above.",
    "Ask one short question about something that happened in the text above.",
    "Ask one short question that a reader of the text above can answer.",
)
WARM_UP, CLIP = 4, 1.0


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub name or a folder")
    parser.add_argument("--text", type=Path, default=ROOT / "bench/demo/observatory.txt", help="a text file")
    parser.add_argument("--output", type=Path, default=Path("self-study"), help="folder of everything that is written")
    parser.add_argument("--prefix-length", type=int, default=64, help="tokens of the prefix that learns")
    parser.add_argument("--conversations", type=int, default=64, help="questions with answers, for training")
    parser.add_argument("--held-out", type=int, default=16, help="questions with answers, for the evaluation")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of the prefix")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a question or an answer, at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="of questions and answers; 0: the most probable")
    parser.add_argument("--chunk-size", type=int, default=512, help="tokens of the text that are read at a time")
    parser.add_argument("--save-every", type=int, default=10, help="steps between two saves")
    parser.add_argument("--ask", action="append", default=[], help="a question to answer at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and of the order of training")
    return parser.parse_args(given)


class Chat:
    """The token ids of a conversation about a text, which is its system message."""

    def __init__(self, tokenizer, text: str):
        self.tokenizer, self.system = tokenizer, [{"role": "system", "content": text}]
        self.text = self._ids(self.system)
        self.end = tokenizer.eos_token_id
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _ids(self, messages: list[dict], **options) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]

    def prompt(self, question: str) -> list[int]:
        """What follows the system message, up to the answer."""
        whole = self._ids([*self.system, {"role": "user", "content": question}], add_generation_prompt=True)
        if whole[: len(self.text)] != self.text:
            raise SystemExit("the chat template changes the system message if a question follows; use another model")
        return whole[len(self.text) :]

    def batch(self, rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
        """Rows padded on the right, or on the left."""
        width = max(map(len, rows))
        fill = [[self.pad] * (width - len(row)) for row in rows]
        ids = [f + row if left else row + f for f, row in zip(fill, rows)]
        real = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f) for f, row in zip(fill, rows)]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}


@torch.no_grad()
def generate(model, chat: Chat, prompts: list, adapter: str, new_tokens: int, temperature: float = 0) -> list[str]:
    given = chat.batch(prompts, left=True)
    given = {name: part.to(model.device) for name, part in given.items()}
    options = {"do_sample": True, "top_k": 50, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(
        **given, **options, max_new_tokens=new_tokens, pad_token_id=chat.pad, adapter_names=[adapter] * len(prompts)
    )
    texts = chat.tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def study(model, chat: Chat, options: argparse.Namespace) -> list[dict]:
    """Questions and answers of the model that reads the text: those in the file, then new ones."""
    path, wanted = options.output / "conversations.jsonl", options.conversations + options.held_out
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    with tqdm(total=wanted, initial=min(len(found), wanted), desc="conversations", dynamic_ncols=True) as bar:
        while len(found) < wanted:
            size = min(options.batch_size, wanted - len(found))
            torch.manual_seed(options.seed + len(found))  # so that a run that continues draws the same
            seeds = [chat.prompt(SEEDS[(len(found) + i) % len(SEEDS)]) for i in range(size)]
            sampled = {"new_tokens": options.new_tokens, "temperature": options.temperature}
            asked = generate(model, chat, seeds, TEXT, **sampled)
            questions = [text.partition("?")[0].strip() + "?" for text in asked]
            answers = generate(model, chat, [chat.prompt(question) for question in questions], TEXT, **sampled)
            new = [{"question": question, "answer": answer} for question, answer in zip(questions, answers)]
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(each) + "\n" for each in new))
            found += new
            bar.update(size)
    return found[:wanted]


def divergence(model, chat: Chat, conversations: list[dict], adapter: str) -> tuple[Tensor, Tensor]:
    """Over the tokens of the answers: the mean KL divergence of the adapter's next-token distribution from that of the
    text, and how often both have the same most probable token."""
    prompts = [chat.prompt(each["question"]) for each in conversations]
    answers = [chat.tokenizer(each["answer"], add_special_tokens=False).input_ids for each in conversations]
    given = chat.batch([prompt + answer + [chat.end] for prompt, answer in zip(prompts, answers)])
    predicts = torch.zeros_like(given["attention_mask"], dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        predicts[row, len(prompt) - 1 : len(prompt) + len(answer)] = True
    given, predicts = {n: part.to(model.device) for n, part in given.items()}, predicts.to(model.device)

    def distribution(name: str) -> Tensor:
        logits = model(**given, use_cache=False, adapter_names=[name] * len(prompts)).logits
        return log_softmax(logits[predicts].float(), dim=-1)

    with torch.no_grad():
        teacher = distribution(TEXT)
    ours = distribution(adapter)
    same = (teacher.argmax(-1) == ours.argmax(-1)).float().mean()
    return (teacher.exp() * (teacher - ours)).sum(-1).mean(), same


@torch.no_grad()
def evaluate(model, chat: Chat, conversations: list[dict], adapter: str) -> dict[str, float]:
    loss, same = divergence(model.eval(), chat, conversations, adapter)
    return {"divergence": loss.item(), "same token": same.item()}


def train(model, chat: Chat, conversations: list[dict], options: argparse.Namespace) -> dict:
    """Train the prefix; returns the losses and the seconds of the steps. Continues from ``training.pt``."""
    path = options.output / "training.pt"
    optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(model, lr=options.learning_rate))
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    past: dict = {"losses": [], "seconds": []}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        past = saved["past"]
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved["weights"][name])
        print(f"continues after step {len(past['losses'])} of {options.steps}")
    model.train()
    done = len(past["losses"])
    with tqdm(total=options.steps, initial=done, desc="training", unit="step", dynamic_ncols=True) as bar:
        for step in range(done, options.steps):
            began = time.perf_counter()
            factor = min(1.0, (step + 1) / WARM_UP) * (1 - step / options.steps)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            # A generator for each step, so that a run that continues draws the same.
            order = torch.randperm(len(conversations), generator=torch.Generator().manual_seed(options.seed + step))
            drawn = [conversations[i] for i in order[: options.batch_size].tolist()]
            loss, _ = divergence(model, chat, drawn, STUDY)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            past["losses"].append(loss.item())
            past["seconds"].append(time.perf_counter() - began)
            bar.set_postfix(divergence=f"{past['losses'][-1]:.3f}", refresh=False)
            bar.update()
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                save(path, {"past": past, "optimizer": optimizer.state_dict(), "weights": trained})
    return past


def save(path: Path, state: dict) -> None:
    """One rename: an interrupt leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save({**state, "weights": {name: p.detach() for name, p in state["weights"].items()}}, temporary)
    os.replace(temporary, path)


def costs(model, chat: Chat, options: argparse.Namespace) -> list[str]:
    """What the text and the prefix cost: memory, and the time of an answer."""
    prefixes = apt_kernels.prefixes(model).values()
    held = sum(p.numel() * p.element_size() for prefix in prefixes for p in prefix.parameters())
    width = sum(part.shape[0] * part.shape[2] for prefix in prefixes for part in prefix.tokens())
    cache = width * len(chat.text) * next(model.parameters()).element_size()
    lines = [
        f"prefix of {options.prefix_length} tokens: {held / 2**20:.1f} MiB with its gates, once for all requests",
        f"text of {len(chat.text)} tokens: {cache / 2**20:.1f} MiB of key/value cache for each request",
    ]
    question = chat.prompt("What is the text about?")
    ways = {
        "with the prefix": (question, STUDY),
        "without": (question, BASE),
        "with the text in its context": ([*chat.text, *question], BASE),
    }
    for name, (prompt, adapter) in ways.items():
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            generate(model, chat, [prompt], adapter, 8)
            seconds.append(time.perf_counter() - began)
        lines.append(f"answer of at most 8 tokens {name}: {min(seconds):.2f} s")
    return lines


def prepare(model, chat: Chat, options: argparse.Namespace) -> None:
    """The model with two adapters: the exact copy of the whole text, and the prefix that trains."""
    length = min(options.prefix_length, len(chat.text))
    options.prefix_length = length
    apt_kernels.patch_from_text(model, chat.text, gate="none", layer_scale=False, chunk_size=options.chunk_size)
    apt_kernels.save(model, options.output / "text")
    apt_kernels.unpatch(model)
    apt_kernels.patch_from_text(model, chat.text[:length], chunk_size=options.chunk_size, gate="static")
    apt_kernels.load(model, options.output / "text", adapter=TEXT)
    apt_kernels.set_adapter(model, STUDY)


def check_settings(options: argparse.Namespace) -> None:
    """The folder's settings are those of this run, so that it can continue."""
    path = options.output / "settings.json"
    unrelated = ("output", "ask", "save_every")
    settings = {name: str(value) for name, value in vars(options).items() if name not in unrelated}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{options.output} has a run with other settings; name another folder with --output")
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def run(model, tokenizer, options: argparse.Namespace) -> dict:
    """All steps on a model that is loaded. Returns what ``results.json`` has."""
    check_settings(options)
    chat = Chat(tokenizer, options.text.read_text(encoding="utf-8").strip())
    prepare(model, chat, options)
    conversations = study(model, chat, options)
    learned, held_out = conversations[: options.conversations], conversations[options.conversations :]
    result = {
        "no prefix": evaluate(model, chat, held_out, BASE),
        "prefix at the start": evaluate(model, chat, held_out, STUDY),
    }
    past = train(model, chat, learned, options)
    result["prefix trained"] = evaluate(model, chat, held_out, STUDY)
    apt_kernels.save(model, options.output / "adapter")
    print("\non held-out conversations      divergence from the text   same most probable token")
    for name, found in result.items():
        print(f"{name:30} {found['divergence']:24.3f} {found['same token']:26.0%}")
    measured = [
        *costs(model, chat, options),
        f"training step: {statistics.median(past['seconds']):.2f} s",
    ]
    print("\n" + "\n".join(measured))
    for question in options.ask:
        print(f"\n{question}")
        for name, adapter in (("no prefix", BASE), ("text", TEXT), ("prefix", STUDY)):
            (answer,) = generate(model, chat, [chat.prompt(question)], adapter, options.new_tokens)
            print(f"  {name:10} {answer}")
    result |= {"losses": past["losses"], "costs": measured}
    (options.output / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def main(given: list[str] | None = None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = arguments(given)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    run(AutoModelForCausalLM.from_pretrained(options.model), tokenizer, options)


if __name__ == "__main__":
    main()
