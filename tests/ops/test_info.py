"""`info` is a dict that prints as a few lines."""

import json

import apt_kernels


def test_info_prints_in_a_few_short_lines():
    found = apt_kernels.info()
    assert json.loads(json.dumps(found)) == found
    lines = str(found).splitlines()
    assert lines[0].startswith("python 3")
    assert len(lines) == 2 + len(found["implementations"])
    assert "asked for: " in lines[1]
    assert any(line.split() == ["reference", "usable"] for line in lines)
    assert "{" not in str(found)
