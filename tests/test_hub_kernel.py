"""`.ci/hub_kernel.py`: builds of `attention` that the package `kernels` loads, several in one process."""

import importlib.util
import inspect
import json
import sys

import pytest
import torch

import apt_kernels
from helpers import distribution
from helpers.documentation import script

hub_kernel = script(".ci/hub_kernel.py")
HEADS, LENGTH, DIM = 2, 3, 8


def load(build):
    """Import a build as `kernels` does: under the identifier in its metadata, from its folder alone."""
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Two builds in this process. They stay: an operator is registered once."""
    return {path.name: load(path) for path in hub_kernel.build(tmp_path_factory.mktemp("kernel"))[:2]}


def results(library):
    torch.manual_seed(0)
    tensors = [torch.randn(2, HEADS, 5, DIM).requires_grad_() for _ in range(3)]
    tensors += [torch.randn(HEADS, LENGTH, DIM).requires_grad_() for _ in range(2)]
    gate = torch.randn(2, 5, LENGTH).requires_grad_()
    out = library.attention(*tensors, gate, 2.0, mask=library.Mask(causal=True))
    return [out, *torch.autograd.grad(out.square().sum(), [*tensors, gate])]


def test_two_builds_compute_what_the_package_computes(builds):
    expected = results(apt_kernels)
    for library in builds.values():
        assert library.attention is not apt_kernels.attention
        for ours, theirs in zip(expected, results(library)):
            assert torch.equal(ours, theirs)


def test_each_build_has_operators_of_its_own(builds):
    names = {library.__name__ for library in builds.values()}
    assert len(names) == 2
    for name in names:
        assert str(getattr(torch.ops, name).attention.default) == f"{name}.attention.default"
    library = builds["torch-cpu"]
    with pytest.raises(library.ArgumentError, match=r"mask is a Mask; it needs an apt_kernels.Mask or None"):
        library.attention(
            *torch.randn(3, 1, HEADS, 5, DIM), *torch.randn(2, HEADS, LENGTH, DIM), mask=apt_kernels.Mask()
        )


def test_a_build_compiles(builds):
    def call(query, prefix):
        return builds["torch-cpu"].attention(query, query, query, prefix, prefix)

    given = torch.randn(1, HEADS, 5, DIM), torch.randn(HEADS, LENGTH, DIM)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), call(*given))


def test_it_needs_torch_alone(tmp_path):
    """In a process where neither the package nor transformers can be imported."""
    build = hub_kernel.build(tmp_path)[0]
    code = f"""
import importlib.util, json, pathlib, sys
sys.modules["transformers"] = sys.modules["apt_kernels"] = None
import torch
{inspect.getsource(load)}
library = load(pathlib.Path({str(build)!r}))
print(tuple(library.attention(*torch.randn(3, 1, 2, 5, 8), *torch.randn(2, 2, 3, 8)).shape))
"""
    assert distribution.run(tmp_path, code)[0] == "(1, 2, 5, 8)"


def test_the_kernels_package_loads_it(tmp_path):
    # It brings the packages of a signature service, so that the extra "test" leaves it out.
    kernels = pytest.importorskip("kernels", reason="kernels is not installed (pip install kernels)")
    hub_kernel.main([str(tmp_path), "--version", "2"])  # another build than the one that is loaded
    library = kernels.get_local_kernel(tmp_path, backend="cpu", trust_remote_code=True)
    for ours, theirs in zip(results(apt_kernels), results(library)):
        assert torch.equal(ours, theirs)
