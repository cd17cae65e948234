"""Time to the first call, and compilations as lengths vary, each contender in a fresh process."""

from bench.speed import compilation, registry
from bench.speed.harness import parametrize


def pytest_generate_tests(metafunc):
    settings = metafunc.config.apt.settings
    cases = settings.chosen(registry.COMPILATION[settings.registry])
    names = [peer for peer in compilation.COMPILATION_PEERS if settings.wants(peer)]
    parametrize(metafunc, cases, names, lambda case: ("first", "later"))


def test_compilation(stage, case, peer, which, settings, enter):
    def measure(seconds: float):
        return compilation.measure(case, settings.device, settings.dtype, seconds, settings.peers)

    enter(stage, case, peer, which, measure, {"shape": vars(case)})
