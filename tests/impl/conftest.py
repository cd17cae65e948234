"""Fixtures of the tests of implementations."""

from helpers.backends import backend

__all__ = ["backend"]
