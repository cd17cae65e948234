"""``csrc/build.py``, which builds the CUDA library, as the module `build`."""

import sys

from ..common import machine

sys.path.insert(0, str(machine.ROOT / "csrc"))

import build

__all__ = ["build"]
