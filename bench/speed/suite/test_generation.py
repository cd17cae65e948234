"""One decoding step of a whole model after a full cache, by model and contender."""

from bench.speed import generation, registry
from bench.speed.harness import parametrize


def pytest_generate_tests(metafunc):
    settings = metafunc.config.apt.settings
    cases = settings.chosen(registry.GENERATION[settings.registry])
    names = [peer for peer in generation.GENERATION_PEERS if settings.wants(peer)]
    parametrize(metafunc, cases, names, lambda case: generation.passes(settings.device))


def test_generation(stage, case, peer, which, settings, enter):
    def measure(seconds: float):
        return generation.measure(case, settings.device, settings.dtype, seconds, settings.peers)

    enter(stage, case, peer, which, measure, {"shape": vars(case), "tokens": case.batch})
