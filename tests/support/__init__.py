"""The table of docs/support.md: ``python -m support`` writes it from a run of the tests."""
