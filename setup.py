"""Adds the CUDA library where it can be built; everything else that setuptools is told stands in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build as csrc


def skipped() -> str | None:
    """Why the CUDA library is not built; None: it is."""
    if os.environ.get("APT_KERNELS_NO_CUDA") == "1":
        return "APT_KERNELS_NO_CUDA=1 is set"
    try:
        csrc.find_nvcc()
        csrc.find_cxx()
        csrc.find_torch()
    except csrc.BuildError as error:
        return str(error)
    return None


class BuildLibrary(build_ext):
    """Calls the compilers itself: torch is needed for its headers only, and no Python ABI is."""

    def build_extension(self, ext):
        try:
            csrc.build_device(Path(self.get_ext_fullpath(ext.name)))
        except csrc.BuildError as error:
            sys.exit(f"apt-kernels: the CUDA library failed to build; APT_KERNELS_NO_CUDA=1 goes without it: {error}")

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + csrc.LIBRARY.suffix


class AnyPython(bdist_wheel):
    """One wheel for every Python: the library speaks torch's stable ABI, not Python's."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


reason = skipped()
if reason:
    print(f"apt-kernels: the CUDA library is not built: {reason}", file=sys.stderr)
    setup()
else:
    name = ".".join(csrc.LIBRARY.with_suffix("").parts)
    setup(ext_modules=[Extension(name, [])], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
