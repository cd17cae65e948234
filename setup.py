"""Everything that setuptools is told stands in pyproject.toml."""

from setuptools import setup

setup()
