"""Predicted times: the model by hand, what bounds a case, and the committed tables, which follow from the counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("tqdm", reason="the package tqdm is not installed")

from bench.compiled import flash4, issue_model, library_model, predict, predicted_measured, triton_model
from bench.compiled.issue_model import CHIPS, LAUNCH, Chip, NotCountedError, Predicted, Work
from bench.speed import registry, tables
from bench.speed.shapes import PREDICTED, Shape, causal

# Two multiprocessors at 1 kHz with 4 multiply-adds a cycle, and 1,000 bytes a second.
TOY = Chip("0.0", 2, 1e3, 4, 1e3, None, "sm_0", "none")
# What takes TOY a second each.
SECOND = {"instructions": 256e3, "exponentials": 32e3, "multiply_adds": 8e3, "moved": 1e3}
BOUNDS = dict(zip(SECOND, ("issue", "exponentials", "tensor", "bytes")))


def test_each_kind_of_work_takes_its_time():
    found = Work(**{name: (i + 1) * amount for i, (name, amount) in enumerate(SECOND.items())}).bounds(TOY)
    assert found == {"issue": 1, "exponentials": 2, "tensor": 3, "bytes": 4}
    assert TOY.peak == 16e3


@pytest.mark.parametrize("largest", SECOND)
def test_every_bound_is_reached(largest):
    work = Work(**{name: amount * (5 if name == largest else 2) for name, amount in SECOND.items()})
    found = issue_model.predict([work], TOY)
    assert found.bound == BOUNDS[largest]
    assert found.least == pytest.approx(5 + LAUNCH)
    # Products run after the rest: 2 + 5 or 5 + 2; bytes are moved meanwhile.
    assert found.most == pytest.approx({"moved": 5}.get(largest, 7) + LAUNCH)


def test_balance_and_launches_lengthen_a_pass():
    work = Work(instructions=SECOND["instructions"], moved=SECOND["moved"], stretch=1.5, launches=2)
    found = issue_model.predict([work, Work(launches=0)], TOY)
    assert (found.least, found.most) == pytest.approx((1.5 + 2 * LAUNCH, 1.5 + 2 * LAUNCH))
    both = found + Predicted(2.0, 3.0, "bytes")
    assert (both.least, both.bound) == (found.least + 2, "bytes")
    assert both.share(16e3, TOY) == (1 / both.most, 1 / both.least)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "kind"), [*product((16, 20), (2, 3, 8), (2, 4, 8), ("causal", "encoder"))]
)
def test_elements_are_those_of_the_tiles(tokens, rows, columns, kind):
    """Against a walk over all tiles: one that a query sees in part is executed whole."""
    shape = Shape(kind, 3, 2, 1, tokens, tokens, 64, 4, "none")

    def seen(query: int, key: int) -> bool:
        return query < tokens and key < tokens and (key <= query or kind != "causal")

    whole = masked = 0
    for q, k in product(range(0, tokens, rows), range(0, tokens, columns)):
        tile = [seen(q + i, k + j) for i in range(rows) for j in range(columns)]
        keys = [q < tokens and k + j < tokens and (kind != "causal" or k + j <= q) for j in range(columns)]
        if any(tile):
            whole, masked = (whole + 1, masked) if all(keys) else (whole, masked + 1)
    size = 6 * rows * columns
    assert issue_model.query_elements(shape, rows, columns) == (whole * size, masked * size)
    if tokens % rows == tokens % columns == 0:
        assert issue_model.key_elements(shape, rows, columns) == (whole * size, masked * size)


def test_a_call_of_the_triton_kernels_by_hand():
    """Tiles of 128 x 128: six whole and four masked ones a head for 512 tokens; the prefix has one column of tiles."""
    shape, chip = causal(1, 2, 1, 512, 128, 64), CHIPS["H100"]
    key = "sm_90 D128 causal attention_forward {}"
    tokens, masked, prefix = (
        issue_model.counted(key.format(n), "3.9") for n in ("tokens", "tokens, checked", "prefix")
    )
    forward, gate = triton_model.triton(shape, chip, "forward")
    tile = 2 * 128 * 128
    assert forward.instructions == pytest.approx(tile * (6 * tokens + 4 * masked) + 2 * 512 * 64 * prefix)
    assert forward.exponentials == 10 * tile + 2 * 512 * 64
    assert forward.multiply_adds == 2 * 128 * forward.exponentials
    assert forward.moved == 2 * (2 + 1) * 512 * 128 * 2 + 2 * 64 * 128 * 4
    assert gate.multiply_adds == 256 * 64
    backward = triton_model.triton(shape, chip, "backward")
    # dq, dk and dv, the prefix's gradient in a launch of its own, the sum of its parts, and two of the gate's product.
    assert [work.launches for work in backward] == [1, 1, 1, 1, 2]
    # dq has tiles of 128 x 64, of which a head executes 20; dk and dv have 36 of 64 x 64.
    assert backward[0].multiply_adds == 3 * 128 * 2 * (20 * 128 * 64 + 512 * 64)
    assert backward[1].multiply_adds == 4 * 128 * 2 * 36 * 64 * 64


def test_a_gate_for_each_query_costs_more():
    chip = CHIPS["H100"]
    none, query = (
        triton_model.triton(causal(1, 2, 1, 512, 64, 64, gate), chip, "backward") for gate in ("none", "query")
    )
    assert query[0].exponentials - none[0].exponentials == 2 * 2 * 512 * 64
    assert len(query) == len(none) + 2  # the gate's gradient, and its product's
    assert sum(work.launches for work in query) == sum(work.launches for work in none) + 3


def test_a_call_of_the_library_by_hand():
    shape, chip = Shape("encoder", 1, 2, 2, 128, 128, 64, 64, "none"), CHIPS["T4"]
    key = "sm_75 D64 plain plain_forward {}"
    (forward,) = library_model.library(shape, chip, "forward")
    tokens, prefix = (issue_model.counted(key.format(name), "nvcc") for name in ("tokens", "prefix, gate per row"))
    assert forward.instructions == pytest.approx(2 * 128 * (128 * tokens + 64 * prefix))
    joined, attention = library_model.concatenated(shape, chip, "forward")
    assert attention.multiply_adds == 2 * 64 * 2 * 128 * (128 + 64)
    key_bytes = 2 * 128 * 64 * 2
    assert joined.moved == 2 * 2 * 64 * 64 * 4 + 2 * key_bytes * (1 + 1.5)


def test_what_is_not_counted_is_named():
    with pytest.raises(NotCountedError, match="sm_75 D64 plain plain_key_gradient"):
        library_model.library(Shape("causal", 1, 1, 1, 128, 128, 64, 64, "none"), CHIPS["T4"], "backward")
    shape = causal(1, 2, 1, 512, 64, 64)
    with pytest.raises(NotCountedError, match=r"Triton does not run on 7\.5"):
        triton_model.triton(shape, CHIPS["T4"], "forward")
    with pytest.raises(NotCountedError, match=r"flash-attn-4 on 8\.0"):
        triton_model.merge_flash4(shape, CHIPS["A100"], "forward")


def test_an_unknown_chip_is_refused_by_name(capsys):
    with pytest.raises(ValueError, match=r"the chip is 'V100'; it needs one of T4, A10"):
        issue_model.chip("V100")
    with pytest.raises(SystemExit):
        predict.main(["--chip", "V100"])
    assert "'V100'" in capsys.readouterr().err


def test_peaks_are_the_published_ones():
    published = {"T4": 65, "A10": 125, "RTX 4090": 165.2, "A100": 312, "H100": 989.4, "H200": 989.4, "B200": 2250,
                 "RTX 5090": 838 / 4}  # fmt: skip
    assert {name: chip.peak / 1e12 for name, chip in CHIPS.items()} == pytest.approx(published, rel=0.01)
    assert all(chip.source for chip in CHIPS.values())


def test_flash4_counts_are_those_of_the_notes():
    notes = " ".join((Path(predict.__file__).parents[1] / "NOTES.md").read_text(encoding="utf-8").split())
    for name in flash4.Counted._fields:
        wide, narrow = (f"{getattr(flash4.COUNTED['sm_90', dim], name):.2f}" for dim in (128, 64))
        assert f"{wide}; {narrow}" in notes


# --- the tables


def test_what_is_committed_follows_from_the_counts():
    for path, text in predict.files().items():
        assert path.read_text(encoding="utf-8") == text, "stale: python -m bench compiled predict --write " + str(
            path.parent
        )


def test_a_changed_count_changes_the_prediction(monkeypatch):
    shape = causal(16, 32, 8, 512, 64, 64)
    before, counted = predict.row("triton", shape, "H100"), issue_model.rates.budgets()
    counted["sm_90 D64 causal attention_forward tokens"]["3.9"] *= 2
    monkeypatch.setattr(issue_model, "_budgets", lambda: counted)
    assert predict.row("triton", shape, "H100")["predicted"] != before["predicted"]


def test_every_table_and_row_says_that_it_is_a_prediction():
    for name in ("README.md", "predictions.jsonl"):
        lines = (predict.FOLDER / name).read_text(encoding="utf-8").splitlines()
        if name == "README.md":
            assert lines[0] == f"# {predict.MARK}"
            headers = [i for i, line in enumerate(lines) if line.startswith("| chip | head_dim")]
            assert len(headers) == 2
            assert all(lines[i - 2].startswith(predict.MARK) for i in headers)
            assert all(line.endswith("| not measured |") for i in headers for line in lines[i + 2 : lines.index("", i)])
        else:
            assert {json.loads(line)["note"] for line in lines} == {predict.MARK}
            assert not any(json.loads(line)["measured"] for line in lines)


def test_the_faster_one_is_favoured_only_if_it_is_so_with_and_without_overlap():
    fast, slow, wide = Predicted(1, 2, "issue"), Predicted(1.5, 3, "issue"), Predicted(0.5, 4, "issue")
    assert predict.favoured({"a": fast, "b": slow}, False) == "a"
    assert predict.favoured({"a": slow, "b": fast}, False) == "b"
    assert predict.favoured({"a": fast, "b": wide}, False) == "undecided"
    assert predict.favoured({"a": fast, "b": "missing"}, False) == "-"
    # A bound from below never favours the one that it bounds.
    assert predict.favoured({"a": slow, "b": fast}, True) == "undecided"
    assert predict.favoured({"a": fast, "b": slow}, True) == "undecided"
    assert predict.favoured({"a": fast, "b": Predicted(2.5, 9, "bytes")}, True) == "a"


def test_no_call_concatenates_for_a_gate_of_each_query():
    (line,) = {json.dumps(one["predicted"]["forward"].keys() - {"cuda"}, default=list)
               for one in predict.rows("cuda", "A10") if one["gate"] == "query"}  # fmt: skip
    assert line == "[]"


# --- measured beside predicted


def _results(folder: Path, device: str, times: dict[tuple[str, str], float]) -> Path:
    entries = [
        {
            "extra_info": {"stage": "causal", "case": case, "peer": peer, "which": which, "note": "fused"},
            "stats": tables.statistics_of([seconds] * 3),
        }
        for (case, peer), seconds in times.items()
        for which in ("forward", "both")
    ]
    found = {"device": device, "threads": 16, "versions": {"torch": "2.13.0"}, "cuda": "13.0"}
    given = {"machine_info": found, "commit_info": {"id": "abc", "dirty": False}, "settings": {"dtype": "bfloat16"}}
    folder.mkdir(exist_ok=True)
    (folder / "causal.json").write_text(json.dumps({**given, "benchmarks": entries, "skipped": []}))
    return folder


def test_measured_times_stand_beside_the_predictions(tmp_path, capsys):
    short, long = (causal(8192 // t, 32, 8, t, 128, 64).name for t in (2048, 8192))
    times = {(short, "ours:triton"): 1e-3, (short, "ours:triton:merge"): 2e-3, (short, "concat_efficient"): 9e-3,
             (long, "ours:triton"): 4e-3, (long, "ours:triton:merge"): 3e-3}  # fmt: skip
    folder = _results(tmp_path / "json", "NVIDIA H100 80GB HBM3", times)
    assert predict.main(["--measured", str(folder), "--write", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "triton 1.000 / 1.000; merge 2.000 / 2.000; concatenation 9.000 / 9.000 |" in text
    assert "Measured: NVIDIA H100 80GB HBM3" in text
    assert text.count("3.000 / 3.000") == 1, "the times are not those of another chip"
    found = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [one["measured"]["merge"]["both"] for one in found if one["measured"]] == [2.0, 3.0]
    assert '("sm_90", 128): ("merge", 8192),' in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_script_puts_its_times_beside_the_predictions(tmp_path):
    """Its last step, after stages whose results are on disk."""
    case = causal(4, 32, 8, 2048, 128, 64).name
    _results(tmp_path / "json", "NVIDIA H100 80GB HBM3", {(case, "ours:triton"): 1e-3})
    settings = {"APT_OUT": str(tmp_path), "APT_STAGES": "none", "APT_REGISTRY": "predicted", "PYTHON": sys.executable}
    script = Path(predict.__file__).parents[1] / "gpu.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton 1.000 / 1.000 |" in (tmp_path / "predictions" / "README.md").read_text()
    assert "_MERGED stays as it is" in done.stdout


def test_an_entry_begins_where_the_same_kernel_begins_to_win(tmp_path):
    kernels = {512: "merge", 2048: "merge_flash4", 8192: "merge_flash4"}
    times = {}
    for tokens, kernel in kernels.items():
        case = causal(8192 // tokens, 32, 8, tokens, 64, 64).name
        times |= {(case, "ours:triton"): 3e-3, (case, "ours:triton:merge"): 2e-3, (case, "ours:cuda"): 1e-4}
        times[case, f"ours:triton:{kernel}"] = 1e-3
    said = predicted_measured.load(_results(tmp_path / "json", "NVIDIA B200", times)).dispatch()
    assert said.splitlines()[1:] == ['    ("sm_100", 64): ("merge_flash4", 2048),']


def test_no_entry_follows_where_the_fused_kernels_win_a_longest_case(tmp_path):
    names = [causal(1, 32, 8, 8192, 64, 64, gate).name for gate in ("none", "row")]
    times = {(name, "ours:triton"): 2e-3 for name in names} | {(names[0], "ours:triton:merge"): 1e-3}
    times |= {(names[1], "ours:triton:merge"): 3e-3}
    for last in (1e-3, 3e-3):  # one of the two cases, then none
        times[names[0], "ours:triton:merge"] = last
        measured = predicted_measured.load(_results(tmp_path / "json", "NVIDIA H200", times))
        assert "_MERGED stays as it is" in measured.dispatch()


def test_results_of_an_unknown_machine_are_refused(tmp_path, capsys):
    folder = _results(tmp_path / "json", "NVIDIA L4", {("c", "naive"): 1.0})
    with pytest.raises(ValueError, match=r"the results are of 'NVIDIA L4'; predictions need one of T4"):
        predicted_measured.load(folder)
    with pytest.raises(SystemExit):
        predict.main(["--measured", str(folder)])
    assert "the results are of 'NVIDIA L4'" in capsys.readouterr().err


def test_the_registry_measures_every_predicted_case():
    names = {case.name for cases in registry.cases("predicted").values() for case in cases}
    assert names == {shape.name for table in PREDICTED.values() for kind in table.values() for shape in kind}
