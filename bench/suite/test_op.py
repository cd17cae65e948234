"""The op: forward, backward and both, by shape and peer. Stages: `bench.shapes.OP_STAGES`."""

import pytest
from conftest import TAPE, parametrize

from bench import counts, op
from bench.peers import peers
from bench.shapes import REGISTRIES


def pytest_generate_tests(metafunc):
    settings = metafunc.config.apt.settings
    names = [p.name for p in peers() if not settings.peers or any(op.is_called(p.name, n) for n in settings.peers)]
    cases = settings.chosen(REGISTRIES[settings.registry])
    parametrize(metafunc, cases, names, lambda shape: op.passes(shape, settings.device))


@pytest.mark.benchmark(timer=TAPE)
def test_op(stage, case, peer, which, settings, enter):
    def measure(seconds: float) -> op.Measured:
        return op.measure(case, settings.device, settings.dtype, seconds, settings.peers)

    counted = "forward" if which == "graph" else which
    has_prefix = not peer.startswith("no_prefix")
    extra = {
        "shape": vars(case),
        "flops": counts.flops(case, counted) if has_prefix else counts.attention_flops(case, counts.visible(case), counted),
        "fewest_bytes": counts.fewest_bytes(case, settings.dtype, counted, has_prefix),
        "share": counts.share(case, counted),
    }
    enter(stage, case, peer, which, measure, extra)
