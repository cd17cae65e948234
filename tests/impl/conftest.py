"""Fixtures of the tests of implementations."""

from helpers.backends import backend  # noqa: F401
