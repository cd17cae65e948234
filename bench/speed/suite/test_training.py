"""Whole training steps of a frozen model with a prefix, by model and contender."""

from bench.speed import registry, training_step
from bench.speed.harness import parametrize
from bench.speed.models import TRAINING_PEERS


def pytest_generate_tests(metafunc):
    settings = metafunc.config.apt.settings
    cases = settings.chosen(registry.TRAINING[settings.registry])
    parametrize(metafunc, cases, [p for p in TRAINING_PEERS if settings.wants(p)], lambda case: ("step",))


def test_training(stage, case, peer, which, settings, enter):
    def measure(seconds: float):
        return training_step.measure(case, settings.device, settings.dtype, seconds, settings.peers)

    enter(stage, case, peer, which, measure, {"shape": vars(case), "tokens": case.batch * case.tokens})
