"""Train a prefix of a decoder on a document and questions about it, and compare the answers with and without it.

Run it by ``make demo``, or ``python -m bench demo --help``. (``--task docstrings``: the demo of an encoder.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import apt_kernels
from bench.common.machine import described
from bench.common.markdown import markdown
from bench.demo import report, step_costs
from bench.quality import models, packaged
from bench.quality.sources import DataError

SMOLLM2 = "smollm2"
_HERE = Path(__file__).parent
_IGNORED = -100  # label of a token that is not predicted
_WARM_UP, _CLIP = 4, 1.0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench demo",
        description=__doc__.partition("\n")[0],
        epilog="--task docstrings --help shows the options of the encoder's demo.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=SMOLLM2, help="a local folder, a hub name, or the packaged SmolLM2")
    parser.add_argument("--text", type=Path, help="the document (default: that of an invented observatory)")
    parser.add_argument(
        "--questions",
        type=Path,
        help='JSON lines with "question" and "answer"; without, the prefix trains on the sentences of --text',
    )
    parser.add_argument(
        "--ask", action="append", default=[], metavar="QUESTION", help="asked before and after training"
    )
    parser.add_argument("--gate", default="token", help="of the prefix; see apt_kernels.AptConfig")
    parser.add_argument("--steps", type=int, default=36, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help=" ")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of all that trains")
    parser.add_argument("--new-tokens", type=int, default=20, help="of an answer, at most")
    parser.add_argument("--compare-tokens", type=int, default=1024, help="of the steps that are timed; 0: none")
    parser.add_argument("--compare-prefix", type=int, default=64, help="prefix tokens of the steps that are timed")
    parser.add_argument("--seed", type=int, default=0, help="order of the training rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" ")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder of the adapter, tables and figure"
    )
    parser.add_argument("--update-docs", action="store_true", help="put the tables and the figure into docs/demo.md")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Question:
    """A question, an answer to learn from (or none), and a text that a right answer contains (or none)."""

    question: str
    answer: str | None = None
    expected: str | None = None


@dataclass(frozen=True)
class Document:
    """The text, what the prefix trains on, and what is asked."""

    text: str
    train: list[Question]  # empty: the prefix trains on the sentences of the text
    asked: list[Question]


def read(options: argparse.Namespace) -> Document:
    """The document and its questions.

    Raises:
        DataError: a file is missing or empty, or a row has no question and answer.
    """
    own = [Question(text) for text in options.ask]
    if options.text is None:
        found = built_in()
        return Document(found.text, found.train, found.asked + own)
    rows = [] if options.questions is None else _rows(options.questions)
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("question"), str) or "answer" not in row:
            raise DataError(f'{options.questions} has the row {row!r}; it needs "question" and "answer"')
    train = [Question(row["question"], str(row["answer"])) for row in rows]
    return Document(_text(options.text), train, own or [Question("What is this text about?")])


def built_in() -> Document:
    """The document about an invented observatory, with its questions."""
    rows = _rows(_HERE / "observatory.jsonl")
    asked = [Question(row["question"], row["answer"], row["expected"]) for row in rows if row["use"] == "ask"]
    train = [Question(row["question"], row["answer"]) for row in rows if row["use"] == "train"]
    return Document(_text(_HERE / "observatory.txt"), train, asked)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not text:
        raise DataError(f"{path} is empty; it needs a text")
    return text


def _rows(path: Path) -> list:
    try:
        return [json.loads(line) for line in _text(path).splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} has a line that is not JSON: {error}") from None


def _load(name: str) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(name)


def _title(name: str) -> str:
    """The model's name for tables: no path."""
    return "SmolLM2-135M-Instruct" if name == SMOLLM2 else Path(name).name


class Reader:
    """A model and its tokeniser; texts get the format with which the model was trained."""

    def __init__(self, name: str, device: torch.device):
        self.model, self.tokenizer = packaged.smollm2() if name == SMOLLM2 else _load(name)
        self.model.to(device)
        self.device = device
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def document(self, text: str) -> Tensor:
        """The tokens ``[M]`` of the document, as a system message if the tokeniser has a chat template."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False)
        else:
            text = text + "\n\n"
        return torch.tensor(self.tokenizer(text).input_ids)

    def _prompt(self, question: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return self.tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False).input_ids
        # A chat template may add a default system message: pass an empty one, and cut the text after it.
        system = {"role": "system", "content": ""}
        messages = [system, {"role": "user", "content": question}]
        template = self.tokenizer.apply_chat_template
        front = template([system], tokenize=False)
        whole = template(messages, tokenize=False, add_generation_prompt=True)
        if not whole.startswith(front):
            raise DataError("the model's chat template has no system message; name a model that has one")
        return self.tokenizer(whole[len(front) :], add_special_tokens=False).input_ids

    def rows(self, questions: list[Question]) -> list[tuple[list[int], list[int]]]:
        """Input tokens and labels of questions with their answers."""
        found = []
        for each in questions:
            prompt = self._prompt(each.question)
            answer = self.tokenizer(f" {each.answer}" if not self.tokenizer.chat_template else each.answer)
            answer = [*answer.input_ids, self.tokenizer.eos_token_id]
            found.append((prompt + answer, [_IGNORED] * len(prompt) + answer))
        return found

    def sentences(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Input tokens and labels of the text's sentences."""
        parts = (self.tokenizer(part).input_ids for part in re.split(r"(?<=[.!?])\s+", text))
        return [(ids, ids) for ids in parts if len(ids) > 1]

    def batch(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Rows padded on the right."""
        width = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        parts = {
            "input_ids": [ids + [pad] * (width - len(ids)) for ids, _ in rows],
            "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows],
            "labels": [labels + [_IGNORED] * (width - len(labels)) for _, labels in rows],
        }
        return {name: torch.tensor(part, device=self.device) for name, part in parts.items()}

    @torch.no_grad()
    def answers(self, model: nn.Module, questions: list[Question], new_tokens: int) -> list[str]:
        """The most probable continuation of each question, all of them in one batch padded on the left."""
        prompts = [self._prompt(each.question) for each in questions]
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        made = model.eval().generate(
            input_ids=ids, attention_mask=real, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
        )
        texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def train(reader: Reader, model: nn.Module, rows: list, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Train the trainable parameters on randomly drawn rows. Returns the losses and the seconds of the steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * (1 - step / options.steps)
    )
    generator = torch.Generator().manual_seed(options.seed)
    losses, seconds = [], []
    model.train()
    with tqdm(total=options.steps, desc="training", unit="step", dynamic_ncols=True) as bar:
        for _ in range(options.steps):
            began = time.perf_counter()
            drawn = torch.randperm(len(rows), generator=generator)[: options.batch_size].tolist()
            loss = model(**reader.batch([rows[i] for i in drawn]), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return losses, seconds


def main(argv: list[str] | None = None) -> int:
    """Read, train, ask, compare, and write the results; 1 if a check failed."""
    began, options = time.perf_counter(), arguments(argv)
    document = read(options)
    if options.model == SMOLLM2:
        os.environ["HF_HUB_OFFLINE"] = "1"
    models.quiet(options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"loading {_title(options.model)}", flush=True)
    reader, failures = Reader(options.model, torch.device(options.device)), []
    model, given = reader.model, {}

    def ask(when: str) -> None:
        given[when] = reader.answers(model, document.asked, options.new_tokens)

    ask("without the text")
    costs = step_costs.measure(model, options.compare_tokens, options.compare_prefix, failures)
    apt_kernels.patch_from_text(model, reader.document(document.text), gate=options.gate)
    ask("prefix from the text")
    rows = reader.rows(document.train) if document.train else reader.sentences(document.text)
    losses, seconds = train(reader, model, rows, options)
    ask("prefix trained")
    probe = apt_kernels.probe(model, [_inputs(reader, rows)])
    probe.picture(options.output / "gates.png", "Mean weight of each token of the document")
    failures += _reload(reader, options, document, given)
    result = {
        "machine": described(reader.device),
        "model": _title(options.model),
        "prefix_tokens": reader.document(document.text).numel(),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_seconds": statistics.median(seconds),
        "losses": losses,
        "questions": [vars(each) for each in document.asked],
        "answers": given,
        "right": _right(document, given),
        "costs": costs,
        "failures": failures,
        "seconds": time.perf_counter() - began,
    }
    _write(options, document, result)
    if options.update_docs and not failures:
        report.update_page(Path("docs/demo.md"), options.output, "document")
    return 1 if failures else 0


def _inputs(reader: Reader, rows: list) -> dict[str, Tensor]:
    batch = reader.batch(rows)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def _reload(reader: Reader, options: argparse.Namespace, document: Document, given: dict) -> list[str]:
    """Save the adapter, remove it, load it again: the answers have to be the same."""
    folder = options.output / "adapter"
    apt_kernels.save(reader.model, folder)
    bare = reader.answers(apt_kernels.unpatch(reader.model), document.asked, options.new_tokens)
    again = reader.answers(apt_kernels.load(reader.model, folder), document.asked, options.new_tokens)
    failures = [] if bare == given["without the text"] else ["unpatched, the model answers otherwise than before"]
    return failures + ([] if again == given["prefix trained"] else ["the reloaded adapter answers otherwise"])


def _right(document: Document, given: dict[str, list[str]]) -> dict[str, int] | None:
    """How many answers contain the expected text, for each time of asking; None if no question has an expected text."""
    if not any(each.expected for each in document.asked):
        return None
    return {
        when: sum(
            each.expected is not None and each.expected.lower() in answer.lower()
            for each, answer in zip(document.asked, answers)
        )
        for when, answers in given.items()
    }


def _write(options: argparse.Namespace, document: Document, result: dict) -> None:
    rows = [
        (each.question, *(result["answers"][when][i] for when in result["answers"]))
        for i, each in enumerate(document.asked)
    ]
    if result["right"] is not None:
        count = sum(each.expected is not None for each in document.asked)
        rows.append(("right", *(f"{number} of {count}" for number in result["right"].values())))
    text = markdown(("Question", *result["answers"]), rows, aligned=False)
    if result["costs"]:
        text += f"\n\n{step_costs.table(result['costs'])}"
    text += (
        f"\n\nModel {result['model']}; a prefix of {result['prefix_tokens']} tokens with gate {options.gate} in every "
        f"layer, {result['trained_parameters']:,} trained parameters, {options.steps} steps of "
        f"{result['step_seconds']:.1f} s, rate {options.learning_rate:g}. Machine: {result['machine']}.\n"
    )
    (options.output / "table.md").write_text(text, encoding="utf-8")
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}")
    for failure in result["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not result["failures"]:
        print("The adapter, loaded again, gives the same answers; without it the model is as before.")
    print(f"{result['seconds']:.0f} s. Adapter, figure, tables and results: {options.output}/")
