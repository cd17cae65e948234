"""The words that messages share."""

import re
from pathlib import Path

import pytest

import apt_kernels
from apt_kernels.errors import its_type


@pytest.mark.parametrize(
    ("value", "expected"), [(3, "an int"), ("a", "a str"), (None, "None"), (OSError(), "an OSError"), ([], "a list")]
)
def test_a_type_has_its_article(value, expected):
    assert its_type(value) == expected


def test_messages_write_no_article_before_a_type():
    """`its_type` writes both."""
    sources = sorted(Path(apt_kernels.__file__).parent.rglob("*.py"))
    assert len(sources) > 50
    wrong = re.compile(r"\b(is|are|this is) an? \{type\(|\(an? \{type\(|\"an? \{type\(")
    assert not [path for path in sources if wrong.search(path.read_text(encoding="utf-8"))]
