"""The paper's comparisons on labelled data: ``python -m bench quality --help``."""
