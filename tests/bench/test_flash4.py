"""`python -m bench compiled flash4`: flash-attn-4 compiled as the strategy calls it. `make flash4` runs it whole."""

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from bench.common import packages
from bench.compiled import flash4, rates


def test_without_the_library_it_says_so_and_fails(tmp_path, capsys):
    assert flash4.compile_apart("sm_90", 64, tmp_path) == 1
    assert "flash-attn-4 cannot be imported" in capsys.readouterr().err


def test_instructions_for_an_element(monkeypatch, tmp_path):
    """Two products of 64 x 64 elements and 64 columns: a warpgroup's threads, each with one element out of 32."""
    body = ["HGMMA.64x64x16.F32.BF16"] * 8 + ["FADD"] * 24
    monkeypatch.setattr(rates, "product_loops", lambda cubin: [body])
    for name in ("a_flash_fwd_sm90_b.sm_90a.cubin", "a_flash_fwd_combine.sm_90a.cubin"):
        (tmp_path / name).write_bytes(b"")
    assert flash4.counts(tmp_path, 64) == ["sm_90 D64 flash_fwd: 1.00 instructions an element"]


def test_packages_are_installed_once_and_whole(monkeypatch, tmp_path):
    asked = []

    def run(command, check):
        asked.append(command[-1])
        target = packages.Path(command[command.index("--target") + 1])
        target.mkdir(parents=True)
        if command[-1] == "broken":
            raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packages.subprocess, "run", run)
    for _ in range(2):
        assert packages.installed("one", "fine") == tmp_path / "apt_kernels" / "one"
    with pytest.raises(KeyboardInterrupt):
        packages.installed("two", "broken")
    assert asked == ["fine", "broken"]
    assert [path.name for path in (tmp_path / "apt_kernels").iterdir()] == ["one"]
