"""The Triton kernels' instructions per element, counted in compiled code and compared with their budgets."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("tqdm", reason="the package tqdm is not installed")

from bench.compiled import rates


def _faults(architecture: str, head: int, variant: str) -> dict[str, list[str]]:
    """By loop; runs without the interpreter."""
    allowed, triton = rates.budgets(), rates.version()
    found = rates.loops(architecture, head, variant)
    assert all(loop.key in allowed for loop in found)
    assert all(0.9 < loop.exponentials < 2.2 for loop in found), "a loop takes another tile than was expected"
    return {loop.key: rates.faults(loop, allowed, triton) for loop in found}


@pytest.mark.parametrize("one", rates.SUBSET, ids=lambda one: "-".join(map(str, one)))
def test_within_budget(one, compiling):
    found = compiling(_faults, *one)
    assert len(found) >= 7
    assert not any(found.values()), found


def test_a_prefix_for_each_row_costs_no_instructions():
    """The loops over tokens are those of one prefix; those over the prefix issue at most a tenth more."""
    allowed, checked = rates.budgets(), 0
    for key, mixed in allowed.items():
        if " mixed " in key:
            one, most = allowed[key.replace(" mixed ", " causal ")], 1.1 if " prefix" in key else 1.0
            checked += len(mixed)
            assert all(mixed[triton] <= most * one[triton] for triton in mixed), key
    assert checked


def _with_a_slow_tile() -> dict[str, list[str]]:
    from apt_kernels.impl.triton import tiles

    entry = tiles.entries("sm_90", 2)[64]
    entry["forward"] = entry["forward"]._replace(columns=32)
    return _faults("sm_90", 64, "causal")


def test_a_slow_tile_is_noticed(compiling):
    found = compiling(_with_a_slow_tile)
    assert "the budget is" in found["sm_90 D64 causal attention_forward tokens"][0]
    assert not found["sm_90 D64 causal query_gradient tokens"]


@pytest.mark.slow
def test_amd_code_is_counted(compiling):
    found = {loop.loop: loop for loop in compiling(rates.loops, "gfx942", 64, "causal")}
    assert {"prefix", "tokens", "tokens, checked"} <= set(found)
    assert all(0.9 < loop.exponentials < 2.2 for loop in found.values())


def test_another_triton_is_counted_in_a_process_of_its_own(monkeypatch, tmp_path):
    asked = []

    def run(command, **named):
        asked.append((command[1:], named["env"]["PYTHONPATH"]))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(rates.subprocess, "run", run)
    monkeypatch.setattr(rates.packages, "installed", lambda *given: asked.append(given) or tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert rates.main(["--head", "64", "--triton", "3.6.0", "--update"]) == 3
    installed, (counted, path) = asked
    assert installed == ("triton-3.6.0", "triton==3.6.0")
    assert counted == ["-m", "bench", "compiled", "rates", "--head", "64", "--update"]
    assert path == str(tmp_path)


def test_what_is_at_fault():
    loop = rates.Loop("sm_90", 64, "causal", "query_gradient", "tokens", 8.0, 1.0, 2, 0)
    assert rates.faults(loop, {}, "3.9") == []
    assert rates.faults(loop, {loop.key: {"3.9": 8.0, "stack": 2}}, "3.9") == []
    slow, spilling = rates.faults(loop, {loop.key: {"3.9": 7.5}}, "3.9")
    assert "issues 8.00 instructions an element; the budget is 7.50" in slow
    assert "stack 2 times" in spilling


def test_loops_are_found_in_text():
    """The innermost loop with products alone, by both kinds of labels."""
    lines = [
        ".L_x_1:", "  /*0000*/ MOV R1, R2 ;", ".L_x_2:", "  /*0010*/ HGMMA.64x64x16.F32.BF16 R1, R2 ;",
        "  /*0020*/ @P0 BRA `(.L_x_2) ;", "  /*0030*/ @P1 BRA `(.L_x_1) ;",
        ".L_x_3:", "  /*0040*/ FADD R1, R2 ;", "  /*0050*/ @P1 BRA `(.L_x_3) ;",
    ]  # fmt: skip
    assert rates._loops(*rates._parsed(lines, r"^(\.L_[\w.]+):", rates._INSTRUCTION)) == [
        ["HGMMA.64x64x16.F32.BF16", "BRA"]
    ]
    amd = ".text\n.LBB0_1:\n\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v0, v1\n\ts_cbranch_scc1 .LBB0_1\n.section"
    assert rates._loops(*rates._amd(amd)) == [["v_mfma_f32_32x32x8_bf16_1k", "s_cbranch_scc1"]]


def test_every_budget_names_a_version():
    found = json.loads(rates.BUDGETS.read_text(encoding="utf-8"))
    assert found == dict(sorted(found.items()))
    assert all(set(budget) <= {"3.6", "3.9", "nvcc", "stack", "why"} for budget in found.values())
