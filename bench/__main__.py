"""The demo, the benchmark, and what is measured without a GPU.

    python -m bench demo                           read a text into a prefix of a real decoder, train it, ask questions
    python -m bench speed                          time and memory against every peer on this machine
    python -m bench decoding                       host time that a prefix adds to a decoding step
    python -m bench mixtures                       a batch with an adapter for each row, against one adapter and LoRA
    python -m bench serving                        what an adapter costs in vLLM on the CPU (make bench-vllm)
    python -m bench compiled                       compile every tile of the Triton kernels, no GPU needed
    python -m bench quality main --task rte ...    the paper's comparisons on labelled data
    python -m bench board                          methods of fine-tuning a decoder: tables over seeds, one figure
    python -m bench first-use                      the default start and the README's snippet on pretrained models
    python -m bench report FOLDER --out FOLDER     tables and figures from the results in a folder

Each command explains its options: python -m bench COMMAND --help.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.common import sharing
from bench.quality.sources import DataError

# The module that implements a command: its ``main`` takes the arguments and returns the exit status.
COMMANDS = {
    "demo": "bench.demo.cli",
    "speed": "bench.speed.run",
    "decoding": "bench.speed.decoding",
    "mixtures": "bench.speed.mixtures",
    "serving": "bench.speed.serving",
    "compiled": "bench.compiled.cli",
    "quality": "bench.quality.cli",
    "board": "bench.quality.board.cli",
    "first-use": "bench.quality.first_use",
    "report": "bench.speed.report",
}
# Commands that train or time, for which it matters whether other processes use the cores.
MEASURED = ("demo", "speed", "decoding", "mixtures", "serving", "quality", "board")


def main(given: list[str] | None = None) -> int:
    """Run one command; the exit status is that of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS, metavar="COMMAND")
    given = sys.argv[1:] if given is None else given
    name = parser.parse_args(given[:1]).command  # the remaining arguments belong to the command
    try:
        return importlib.import_module(COMMANDS[name]).main(given[1:])
    except DataError as error:
        sys.exit(f"python -m bench {name}: {error}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in MEASURED and not {"-h", "--help", "--list-stages"} & set(sys.argv):
        sharing.wait_passively()
    sys.exit(main())
