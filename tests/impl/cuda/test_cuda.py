"""The same checks on a CUDA device: the op, whole models, generation."""

from dataclasses import replace

import pytest
import torch

import apt_kernels
from apt_kernels.impl.cuda import BACKEND as CUDA
from apt_kernels.ops import choose
from helpers import accuracy, cases, models
from helpers.generation import assert_same, generate, tuned
from helpers.patched import check_equals_the_oracle

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", cases.ONE_PREFIX)
def test_the_op_on_every_case(name, dtype):
    x = replace(cases.CASES[name], dtype=dtype).inputs("cuda")
    accuracy.check(x, choose.choose(x).name, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", cases.ONE_PREFIX)
def test_the_library_on_every_case(name, dtype):
    x = replace(cases.CASES[name], dtype=dtype).inputs("cuda")
    obstacle = CUDA.obstacle() or (CUDA.obstacle_for(x) if dtype == torch.bfloat16 else None)
    if obstacle:
        pytest.skip(obstacle)
    accuracy.check(x, "cuda", generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", ["none", "static", "row", "query"])
def test_gradcheck_in_float64(gate):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, device="cuda", requires_grad=True)

    shape = {"none": None, "static": (3,), "row": (2, 3), "query": (2, 5, 3)}[gate]
    logits = None if shape is None else draw(*shape)
    tensors = (draw(2, 4, 5, 16), draw(2, 2, 7, 16), draw(2, 2, 7, 16), draw(2, 3, 16), draw(2, 3, 16))
    mask = apt_kernels.Mask(causal=True)
    assert torch.autograd.gradcheck(lambda *t: apt_kernels.attention(*t, mask=mask), (*tensors, logits, draw(1)))


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("gate", ["first", "token"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_models(family, gate, padding):
    check_equals_the_oracle(family, gate, padding, "cuda")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("gate", ["first", "token"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "t5"])
def test_generation(family, gate, cache):
    model = tuned(family, gate).cuda()
    given = {name: tensor.cuda() for name, tensor in models.inputs(family, "left").items()}
    cached = generate(model, given, cache_implementation=cache, disable_compile=True)
    assert_same(cached, generate(model, given, use_cache=False))
