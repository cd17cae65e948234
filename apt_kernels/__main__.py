"""The command line: ``python -m apt_kernels info | inspect | check | convert | lm-eval``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import AdapterError, ArgumentError, ConfigError, PatchError
from .ops.choose import info

_CODES = """exit codes:
  0  done; check: the adapter fits, and its base model is the one that it was trained on
  1  an error, named on stderr; check: the adapter does not fit
  2  wrong arguments
  3  check: the adapter fits, and something differs (on stdout)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    asked = sys.argv[1:] if arguments is None else list(arguments)
    # Its arguments are those of another program, which argparse would read as its own.
    evaluates = asked[:1] == ["lm-eval"]
    given = _parser().parse_args(asked[:1] if evaluates else asked)
    if given.command == "info":
        print(info())
        return 0
    try:
        if evaluates:
            from .hf import harness  # needs transformers

            return harness.run(asked[1:])
        return _run(given)
    except (AdapterError, ArgumentError, ConfigError, PatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace) -> int:
    from .hf import commands  # needs transformers

    if given.command == "inspect":
        print(commands.inspect(given.folder))
        return 0
    options = {"model_class": given.model_class, "revision": given.revision}
    if given.command == "check":
        differs = commands.check(given.base, given.folder, **options)
        print(f"{given.folder} fits {given.base}")
        for line in differs:
            print(f"differs: {line}")
        return 3 if differs else 0
    options |= {"base": given.base, "max_length": given.max_length, "texts": given.texts}
    print(commands.convert(given.to, given.folder, given.out, **options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m apt_kernels", epilog=_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, and which implementations are usable")
    inspect = commands.add_parser("inspect", help="what is in an adapter folder")
    inspect.add_argument("folder", type=Path)
    check = commands.add_parser("check", help="whether an adapter fits a base model, and what differs")
    check.add_argument("base", help="a folder or a repository of the Hugging Face hub")
    check.add_argument("folder", type=Path, help="the adapter")
    convert = commands.add_parser("convert", help="an adapter to a PEFT checkpoint, or back")
    convert.add_argument("folder", type=Path, help="the adapter; with --to apt, the PEFT checkpoint")
    convert.add_argument("out", type=Path, help="the folder to write to")
    convert.add_argument("--to", required=True, choices=("peft", "cartridge", "apt"))
    convert.add_argument("--base", help="the base model; default: the name that the adapter records")
    convert.add_argument("--max-length", type=int, help="the most tokens to serve, for models with sliding windows")
    convert.add_argument(
        "--texts", type=Path, help="a file with one text a line: export the mean of gates that depend on the input"
    )
    commands.add_parser(
        "lm-eval", help="lm-evaluation-harness on a base model with an adapter; its own arguments follow"
    )
    for each in (check, convert):
        each.add_argument("--model-class", help="a transformers class; default: the one that the adapter records")
        each.add_argument("--revision", help="of the base model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
