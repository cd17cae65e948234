"""The table in docs/support.md, which ``python -m support`` generates from a run of the tests."""
