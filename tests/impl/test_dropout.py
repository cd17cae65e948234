"""The dropout stream: the right rate, no pattern, and the same values for any part of it."""

import pytest
import torch

from apt_kernels.impl.dropout import keep_mask

SEEDS = (0, 1, -1, 2**40 + 7, -(2**62))


def kept(seed, p=0.1, batch=3, heads=4, rows=128, columns=256):
    return keep_mask(torch.tensor([seed]), p, batch, heads, 0, rows, 0, columns)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_rate(seed, p):
    mask = kept(seed, p)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - (1 - p)) < 5 * deviation
    for dims in ((0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):
        means = mask.double().mean(dims)
        spread = (p * (1 - p) / (mask.numel() / means.numel())) ** 0.5
        assert (means - (1 - p)).abs().max() < 5.5 * spread


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_are_not_correlated(seed):
    mask = kept(seed, 0.5).double() - 0.5
    for dim in range(4):
        for step in (1, 2):
            a, b = mask.narrow(dim, 0, mask.shape[dim] - step), mask.narrow(dim, step, mask.shape[dim] - step)
            assert abs((a * b).mean().item() * 4) < 5 / a.numel() ** 0.5


def test_seeds_are_not_correlated():
    masks = [kept(seed, 0.5).double() - 0.5 for seed in (*SEEDS, 2, 3, 2**32, 2**32 + 1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a * b).mean().item() * 4) < 5 / a.numel() ** 0.5


def test_a_part_is_a_part_of_the_whole():
    whole = kept(9)
    part = keep_mask(torch.tensor([9]), 0.1, 3, 4, 40, 50, 17, 100)
    assert torch.equal(part, whole[:, :, 40:90, 17:117])
