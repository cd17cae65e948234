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


def test_info_counts_one_thread_as_one(monkeypatch):
    for count, said in ((1, "1 thread)"), (2, "2 threads)")):
        monkeypatch.setattr("torch.get_num_threads", lambda count=count: count)
        assert said in str(apt_kernels.info())
