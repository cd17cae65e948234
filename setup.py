"""The CUDA library, if APT_KERNELS_CUDA=1 asks for it, and the long description; the rest is in pyproject.toml."""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build as csrc

ROOT = Path(__file__).parent
_ADDRESS = re.compile(r'^Repository = "([^"]+?)/?"', re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")


def long_description() -> str:
    """README.md for a package index, where relative links lead nowhere: links go to the repository's address.

    Without an address in pyproject.toml, links become their text, and images are left out.
    """
    address = _ADDRESS.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def absolute(link: re.Match) -> str:
        image, text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        if not address:
            return "" if image else text
        return f"{image}[{text}]({address[1]}/{'raw' if image else 'blob'}/HEAD/{target})"

    return _LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


class BuildLibrary(build_ext):
    """Calls the compilers itself: torch is needed for its headers only, and no Python ABI is."""

    def build_extension(self, ext):
        try:
            csrc.build_device(Path(self.get_ext_fullpath(ext.name)))
        except csrc.BuildError as error:
            sys.exit(
                f"apt-kernels: APT_KERNELS_CUDA=1 is set, and the CUDA library cannot be built; without that variable "
                f"the package installs without the library: {error}"
            )

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + csrc.LIBRARY.suffix


class AnyPython(bdist_wheel):
    """One wheel for every Python: the library uses torch's stable ABI, not Python's."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def library() -> dict:
    """The arguments that build the CUDA library, if the environment asks for it."""
    asked = os.environ.get("APT_KERNELS_CUDA", "0")
    if asked not in ("0", "1"):
        sys.exit(f"apt-kernels: APT_KERNELS_CUDA is {asked!r}; it needs 1 (build the CUDA library) or 0 (do not)")
    if asked == "0":
        return {}
    name = ".".join(csrc.LIBRARY.with_suffix("").parts)
    return {"ext_modules": [Extension(name, [])], "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": AnyPython}}


setup(long_description=long_description(), long_description_content_type="text/markdown", **library())
