"""The op: forward, backward and both, by shape and peer. Stages: the keys of `bench.speed.shapes.REGISTRIES`."""

from bench.speed import counts, op
from bench.speed.harness import parametrize
from bench.speed.peers import peers
from bench.speed.shapes import REGISTRIES


def pytest_generate_tests(metafunc):
    settings = metafunc.config.apt.settings
    names = [peer.name for peer in peers() if settings.wants(peer.name)]
    cases = settings.chosen(REGISTRIES[settings.registry])
    parametrize(metafunc, cases, names, lambda shape: op.passes(shape, settings.device))


def test_op(stage, case, peer, which, settings, enter):
    def measure(seconds: float) -> op.Measured:
        return op.measure(case, settings.device, settings.dtype, seconds, settings.peers)

    counted = "forward" if which == "graph" else which
    has_prefix = not peer.startswith("no_prefix")
    flops = counts.flops(case, counted) if has_prefix else counts.flops_without(case, counted)
    extra = {
        "shape": vars(case),
        "flops": flops,
        "fewest_bytes": counts.fewest_bytes(case, case.dtype_in(settings.dtype), counted, has_prefix),
        "flop_overhead": counts.flop_overhead(case, counted),
    }
    enter(stage, case, peer, which, measure, extra)
