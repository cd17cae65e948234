"""The commands of ``python -m bench``: help, errors, and the state of the process after a command."""

from __future__ import annotations

import pytest
import torch

from bench import __main__ as bench
from bench.compiled import cli as compiled


@pytest.mark.parametrize("command", [*bench.COMMANDS, *(f"compiled {name}" for name in compiled.COMMANDS)])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([*command.split(), "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m bench {command.removesuffix(' report')} ")
    assert all(len(line) <= 160 for line in printed.splitlines())


def test_the_front_door_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"python -m bench {command} " in printed for command in bench.COMMANDS)


@pytest.mark.parametrize("given", [[], ["spead"], ["--quick"]])
def test_an_unknown_command_is_refused(given, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(given)
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_unreadable_data_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the command sets it; it is taken back here
    with pytest.raises(SystemExit, match=r"python -m bench quality: .* has no split; it needs rows to train on"):
        bench.main(["quality", "--task", "rte", "--data", str(tmp_path), "--model", str(tmp_path)])


def test_the_stages_are_those_of_the_registry(capsys):
    from bench.speed import registry

    assert bench.main(["speed", "--list-stages"]) == 0
    assert capsys.readouterr().out.split() == list(registry.STAGES)


@pytest.mark.parametrize("fails", [False, True])
def test_running_the_launchers_restores_what_it_replaces(fails):
    triton = pytest.importorskip("triton", reason="the package triton is not installed")
    from apt_kernels.impl.triton import arguments, tiles
    from bench.compiled import aot_compile

    def state():
        return (
            tiles.architecture,
            arguments.execute,
            torch.backends.cuda.matmul.fp32_precision,
            dict(vars(triton.runtime.driver)),
        )

    def execute(*given, **named):
        if fails:
            raise KeyboardInterrupt

    before = state()
    job = aot_compile.Job("sm_90", 4, 64, "tf32")
    if fails:
        with pytest.raises(KeyboardInterrupt):
            aot_compile.run_launchers(job, execute)
    else:
        aot_compile.run_launchers(job, execute)
    assert state() == before
