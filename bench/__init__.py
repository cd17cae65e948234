"""The demo and the measurements of this package: ``python -m bench --help``."""
