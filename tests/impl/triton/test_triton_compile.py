"""The Triton kernels compiled ahead of time, which needs no GPU: limits, instructions, and how often they compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("tqdm", reason="the package tqdm is not installed")

_ROOT = Path(__file__).parents[3]
FORWARD_AND_BACKWARD = {
    "attention_forward", "query_gradient", "column_gradients", "finish_gradients"
}  # fmt: skip
SPLIT_FORWARD = {"split_attention", "merge_shares"}
_LENGTHS = [(1, 1, 1, 1), (2, 16, 16, 16), (3, 17, 40, 5), (1, 1, 64, 32), (2, 48, 33, 130)]


def _report(*options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench", "compiled", *options],
        cwd=_ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_representative_entries_compile_within_limits():
    chips = {"sm_86": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    report = _report("--architecture", *chips, "--width", "2", "--head", "64", "--variant", "causal")
    assert report.returncode == 0, report.stdout + report.stderr
    for chip, instruction in chips.items():
        lines = re.findall(rf"^ +{chip.removeprefix('sm_')} 16-bit .*$", report.stdout, re.MULTILINE)
        kernels = {line.split()[4]: line for line in lines}
        assert set(kernels) == FORWARD_AND_BACKWARD
        assert instruction in kernels["attention_forward"]
        assert instruction in kernels["column_gradients"]


@pytest.mark.slow
def test_dense_masks_compile_for_amd():
    """AMD's compiler cannot stage tiles of a mask in shared memory, as it does in two stages."""
    report = _report("--architecture", "gfx90a", "--width", "2", "--head", "64", "--variant", "dense")
    assert report.returncode == 0, report.stdout + report.stderr


def test_tf32_only_where_the_chip_has_it(monkeypatch):
    from apt_kernels.impl.triton.arguments import _precision

    found = {}
    for setting in ("tf32", "ieee"):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=setting))
        found[setting] = [_precision(chip) for chip in ("sm_80", "gfx942", "gfx90a")]
    assert found == {"tf32": ["tf32", "tf32", "ieee"], "ieee": ["ieee"] * 3}


def _count_compilations(variant: str) -> dict[str, int]:
    """Compilations of each kernel over calls that differ in B, T, S and M only. Runs without the interpreter."""
    from bench.compiled import aot_compile

    job = aot_compile.jobs(["sm_80"], [2], [64], [variant])[0]
    kernels = {}

    def execute(kernel, programs, *args, **named):
        kernel.warmup(*args, grid=(programs,), **named)
        kernels[kernel.__name__] = kernel

    for batch, queries, keys, prefix in _LENGTHS:
        aot_compile.run_launchers(job, execute, batch=batch, queries=queries, keys=keys, prefix=prefix)
    return {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}


def _facts_of_launches() -> dict[str, dict[tuple, set[str]]]:
    """By kernel, what launches are kept by, and what Triton compiles in of them. Runs without the interpreter."""
    from apt_kernels.impl.triton import arguments
    from bench.compiled import aot_compile

    found: dict[str, dict[tuple, set[str]]] = {}

    def execute(kernel, programs, *args, **named):
        *_, bind = kernel.device_caches[0]
        _, told, options = bind(*args, **named, debug=False)
        kept = arguments._signature(kernel.fn).key(args, named)
        found.setdefault(kernel.__name__, {}).setdefault(kept, set()).add(repr((told, options)))

    made = aot_compile.make_job_inputs
    for shifted in (False, True):
        if shifted:
            # Queries that do not begin at a multiple of 16 bytes.
            aot_compile.make_job_inputs = lambda job, **sizes: replace(x := made(job, **sizes), query=_shifted(x.query))
        for job in aot_compile.jobs(["sm_90"], [2, 8], [64, 256], aot_compile.VARIANTS):
            for sizes in ({}, {"batch": 1, "keys": 300}, {"batch": 3, "prefix": 1}):
                aot_compile.run_launchers(job, execute, **sizes)
        for wanted in ({"query"}, {"key"}, {"prefix_key", "gate"}):
            aot_compile.run_launchers(aot_compile.jobs(["sm_90"], [2], [64], ["causal"])[0], execute, wanted)
    return found


def _shifted(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].as_strided(tensor.shape, tensor.stride(), 1)


def _launch_twice(variant: str) -> tuple[list, list, int]:
    """The driver's arguments in the first and in the second call, and the number of Triton's own lookups in the second.
    Runs without the interpreter; nothing is launched."""
    import triton

    from apt_kernels.impl.inputs import DIFFERENTIABLE
    from apt_kernels.impl.triton import BACKEND
    from bench.compiled import aot_compile, launch_overhead

    class Handed(launch_overhead.Launches):
        def __call__(self, columns, rows, depth, stream, function, *given):
            handed.append((columns, rows, depth, stream, *map(_form, given[4:])))

    handed, asked, calls, run = [], [], [], triton.JITFunction.run
    x = aot_compile.make_job_inputs(aot_compile.Job("sm_86", 2, 64, variant))
    needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
    triton.JITFunction.run = lambda self, *args, **named: asked.append(self) or run(self, *args, **named)
    with Handed("sm_86"):
        for _ in range(2):
            handed.clear()
            asked.clear()
            result = BACKEND.forward(x, BACKEND.plan(x))
            BACKEND.backward(x, BACKEND.plan(x), result, torch.empty_like(result.out), None, needs)
            calls.append(list(handed))
    return *calls, len(asked)


def _form(given) -> object:
    if isinstance(given, torch.Tensor):
        return given.dtype, given.shape, given.stride()
    return tuple(map(_form, given)) if isinstance(given, tuple) else str(given)


def _faults_of_wide_tiles() -> dict[str, tuple[str, ...]]:
    """The report on tiles too wide for the registers and on a chip with 4 KiB. Runs without the interpreter."""
    from apt_kernels.impl.triton import tiles
    from bench.compiled import aot_compile
    from bench.compiled.report import results_of

    tiles.tile = lambda kernel, *entry: tiles.Tile(128, 128, 4, 1)
    aot_compile.CHIPS["sm_86"] = [replace(chip, block_shared=4096) for chip in aot_compile.CHIPS["sm_86"]]
    found = aot_compile.units(aot_compile.jobs(["sm_86"], [2], [64], ["full"]))
    results = [result for unit in found for result in results_of(unit, aot_compile.compile_unit(unit))]
    assert {result.chip.target for result in results} == {86, 89}
    return {result.unit.kernel: result.faults for result in results}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["window", "causal_gate_query", "bias"])
def test_lengths_cost_no_compilation(variant, compiling):
    counts = compiling(_count_compilations, variant)
    kernels = FORWARD_AND_BACKWARD | SPLIT_FORWARD | ({"token_bias_gradient"} if variant == "bias" else set())
    # Prefixes of at most 32 columns have narrower tiles in the kernel of dq.
    expected = dict.fromkeys(kernels, 1)
    if variant == "window":
        expected["query_gradient"] = 2
    if variant == "causal_gate_query":
        # A single query has one gate: its backward is that of a gate per row, compiled once more for every T = 1.
        # Gates of a multiple of 4 columns load as vectors.
        expected |= {"attention_forward": 2, "query_gradient": 4, "column_gradients": 3, "finish_gradients": 2}
    assert counts == expected


def test_what_is_kept_of_a_launch_tells_all_that_is_compiled_in(compiling):
    found = compiling(_facts_of_launches)
    assert set(found) == FORWARD_AND_BACKWARD | SPLIT_FORWARD | {"token_bias_gradient", "prefix_column_gradients"}
    for kernel, told in found.items():
        assert None not in told
        assert all(len(forms) == 1 for forms in told.values()), kernel
    assert len(found["attention_forward"]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["padding", "decode"])
def test_a_second_launch_is_the_first_and_asks_triton_nothing(variant, compiling):
    first, second, asked = compiling(_launch_twice, variant)
    assert asked == 0
    assert len(first) == (5 if variant == "decode" else 4)
    assert second == first


def _compile_what_is_not_launched() -> str:
    from bench.compiled import aot_compile

    unit = aot_compile.units(aot_compile.jobs(["sm_86"], [2], [64], ["full"]))[0]
    with pytest.raises(RuntimeError) as raised:
        aot_compile.compile_unit(replace(unit, key="another"))
    return str(raised.value)


def test_what_is_not_launched_is_not_kept_as_compiled(compiling):
    assert "launched otherwise" in compiling(_compile_what_is_not_launched)


def test_numbers_of_64_bits_are_left_to_triton(compiling):
    assert compiling(_key_of_far_rows, 1 << 20) is not None
    assert compiling(_key_of_far_rows, 1 << 33) is None


def _host_times() -> dict[str, int]:
    """Launches of every pass that `python -m bench compiled overhead` times. Runs without the interpreter."""
    from bench.compiled import launch_overhead

    found = {}
    with launch_overhead.Launches("sm_86") as launches:
        for name, call in launch_overhead.passes("sm_86").items():
            launches.count = 0
            assert launch_overhead.microseconds(call) > 0
            found[name] = launches.count / (launch_overhead.CALLS + 10)
    return found


@pytest.mark.slow
def test_the_host_is_timed_without_a_gpu(compiling):
    assert compiling(_host_times) == {"forward": 1, "backward": 3, "decoding": 2}


def _key_of_far_rows(stride: int):
    from apt_kernels.impl.triton import arguments, attend

    kernel = attend.attention_forward
    named = dict.fromkeys(arguments._signature(kernel.fn).names, 1) | {"num_warps": 4, "num_stages": 1}
    far = arguments.Rows(torch.zeros(1), stride, 3, 3)
    return arguments._signature(kernel.fn).key((far,), named)


@pytest.mark.slow
def test_report_finds_faults(compiling):
    faults = compiling(_faults_of_wide_tiles)
    assert not any("shared memory" in fault for fault in faults["finish_gradients"])
    assert "spills in a default configuration" in faults["attention_forward"]
    assert "shared memory is over the limit of 4 KiB" in faults["column_gradients"]


def _ptx(target: int) -> str:
    """The forward's PTX, but for the line that names the chip. Runs without the interpreter."""
    from bench.compiled import aot_compile

    aot_compile.CHIPS["sm_86"], found = [aot_compile.Chip(target, 101376, 102400, 48)], []

    def execute(kernel, programs, *args, **named):
        if kernel.__name__ == "attention_forward":
            kernel.device_caches.clear()
            found.append(kernel.warmup(*args, grid=(programs,), **named).asm["ptx"])

    aot_compile.run_launchers(aot_compile.jobs(["sm_86"], [2], [64], ["causal"])[0], execute)
    return re.sub(r"\.target sm_\d+", "", found[0])


@pytest.mark.slow
def test_one_ptx_serves_two_chips(compiling, monkeypatch, tmp_path):
    """`aot_compile.CHIPS` says of 8.9 that it is like 8.6: its code is assembled, not compiled again."""
    # The PTX names the source's path, so that of another checkout must not come from the cache.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compiling(_ptx, 86) == compiling(_ptx, 89)


def _judged(variant: str, architecture: str = "sm_86", width: int = 2, **facts) -> dict:
    """Faults by chip of a forward that compiled to ``facts``."""
    from bench.compiled import aot_compile, report

    job = aot_compile.Job(architecture, width, 64, variant)
    unit = aot_compile.Unit("attention_forward", "key", "128x64 w8 s2", [job])
    known = aot_compile.Facts(**{"registers": 200, "warps": 8, "shared": 50_000, "instruction": "mma.sync", **facts})
    results = report.results_of(unit, {chip.target: known for chip in job.chips})
    return {result.chip.target: result.faults for result in results}


def test_report_judges():
    fine, spills = {86: (), 89: ()}, ("spills in a default configuration",)
    assert _judged("causal") == fine
    assert _judged("causal", stack=8) == {86: spills, 89: spills}
    assert _judged("softcap", stack=8) == fine
    assert "over the limit of 99 KiB" in _judged("softcap", shared=102_000)[89][0]
    assert _judged("causal", "sm_80", shared=102_000) == {80: ()}
    assert _judged("causal", narrow=True)[86] == ("loads rows element by element",)
    assert _judged("causal", width=4, instruction="-") == fine
    assert _judged("causal", "sm_90") == {90: ("needs wgmma.mma_async",)}
    assert _judged("causal", "gfx942", instruction="v_mfma") == {"gfx942": ()}
    assert _judged("softcap", error="PTXASError: no")[86] == ("PTXASError: no",)


def test_table_says_what_was_not_compiled():
    from bench.compiled import aot_compile, report

    jobs = aot_compile.jobs(["sm_86"], [2], [64], ["causal", "softcap"])
    units = [aot_compile.Unit("attention_forward", job.variant, "128x64 w8 s2", [job]) for job in jobs]
    facts = {chip.target: aot_compile.Facts(registers=200, stack=8, instruction="mma.sync") for chip in jobs[0].chips}
    lines = report.summary(units, {"softcap": facts}).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["86", "89"]
    assert all("1 of 2" in line and "up to 8 bytes in rare variants" in line for line in lines)


def test_variants_share_their_code(compiling):
    """The keys' gradients do not depend on sinks: the report compiles them once."""
    kernels = compiling(_kernels_of, ["causal", "sinks"])
    assert kernels.count("column_gradients") == kernels.count("query_gradient") == 1
    assert kernels.count("attention_forward") == 2


def _kernels_of(variants: list[str]) -> list[str]:
    from bench.compiled import aot_compile

    return [unit.kernel for unit in aot_compile.units(aot_compile.jobs(["sm_90"], [2], [64], variants))]


def test_import_needs_torch_alone():
    code = "import apt_kernels, sys; sys.exit(any(name.partition('.')[0] == 'triton' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=_ROOT).returncode == 0
