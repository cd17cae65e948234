"""The bounded search for patterns finds what Python's `re` finds."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_kernels import ConfigError, patterns
from helpers.cases import examples
from helpers.processor_time import at_most

NAMES = ["model.layers.11.self_attn.q_proj.weight", "classifier.bias", "", "a", "aab.b\n", "layers.1"]
ATOMS = st.sampled_from(["a", "b", r"\.", ".", r"\d", r"\w", r"\S", "[ab]", "[^a]", "[0-9.]", "^", "$", r"\b", r"\B"])


@st.composite
def expressions(draw, depth=2):
    if depth == 0:
        return draw(ATOMS)
    kind = draw(st.sampled_from(["atom", "sequence", "branch", "repeat", "look"]))
    parts = [draw(expressions(depth - 1)) for _ in range(2)]
    if kind == "atom":
        return draw(ATOMS)
    if kind == "sequence":
        return "".join(parts)
    if kind == "branch":
        return f"({parts[0]}|{parts[1]})"
    if kind == "repeat":
        return f"(?:{parts[0]})" + draw(st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?"]))
    return draw(st.sampled_from(["(?={})", "(?!{})", "(?<=a)", "(?<!b.)"])).format(parts[0])


@given(expressions(), st.text("ab.1_\n", max_size=8))
@examples(150)
def test_a_search_finds_what_re_finds(pattern, text):
    assert patterns.search(pattern, text) == (re.search(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [r"layers\.1\.", r"layers\.\d+$", "bias|weight", r"^model.*proj", r"(?<!q_)proj", r"^(?!.*bias).*", r"\bq_proj\b"],
)
def test_patterns_that_people_write(pattern):
    patterns.check("layers", pattern)
    for name in NAMES:
        assert patterns.search(pattern, name) == (re.search(pattern, name) is not None)


@pytest.mark.parametrize("pattern", [r"((\w+\.?)+)+!", "(a*)*b", "(a|a)*b", "(.*.*.*)*x", "(a?){50}a{50}b"])
def test_patterns_on_which_re_takes_for_ever(pattern):
    patterns.check("layers", pattern)
    with at_most(5):
        assert not patterns.search(pattern, "a" * 60)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a)\1", "groupref"),
        ("(a)(?(1)b|c)", "groupref_exists"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        ("((a{60}){60}){60}", "too many repetitions"),
        ("(((a{0}){99999}){99999}){9}", "too many repetitions"),
        ("a{0,99999}", "too many repetitions"),
        ("(?=(?=a)b)", "within an assertion"),
        ("a" * 2000, "2000 characters"),
        ("(" * 500 + ")" * 500, "regular expression|repetitions|recursion"),
        ("(a", "it needs a regular expression"),
        ("a{99999999999}", "it needs a regular expression"),
    ],
)
def test_patterns_that_a_file_cannot_have(pattern, reason):
    # "regular": it may pass, as deep as this Python's parser goes.
    deep = reason.startswith("regular")
    with at_most(5), contextlib.suppress(ConfigError) if deep else pytest.raises(ConfigError, match=reason):
        patterns.check("layers", pattern)


def test_the_work_of_all_searches_is_bounded():
    budget = patterns.Budget()

    def search_often(pattern):
        for _ in range(10_000):
            patterns.search(pattern, "a" * 60, budget)

    with at_most(20), pytest.raises(patterns.TooMuchWork, match="too much work"):
        search_often("((a?){20}){40}b")


def test_the_work_of_assertions_counts():
    with at_most(5), pytest.raises(patterns.TooMuchWork):
        patterns.search("(.(?=(.?){500}!))*x", "a" * 90, patterns.Budget(10**5))


def test_back_references_of_a_user_go_to_re():
    assert patterns.search(r"(a)\1", "baab")
    assert not patterns.search(r"(a)\1", "bab")
