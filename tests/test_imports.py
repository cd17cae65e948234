"""What `import apt_kernels` needs and does, in fresh processes."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked {{name}}", name=name)
sys.meta_path.insert(0, Block())
"""
USE = """
import torch, apt_kernels
q, p = torch.randn(1, 2, 3, 16), torch.randn(2, 4, 16)
out = apt_kernels.attention(q, q, q, p, p, torch.zeros(4), 2.0, mask=apt_kernels.Mask(causal=True))
assert out.shape == (1, 2, 3, 16)
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("blocked", [("triton",), ("transformers",), ("triton", "transformers", "safetensors")])
def test_torch_alone_is_enough(blocked):
    done = run(BLOCK.format(blocked=blocked) + USE)
    assert done.returncode == 0, done.stderr


def test_without_transformers_patch_says_what_is_missing():
    done = run(BLOCK.format(blocked=("transformers",)) + "import apt_kernels; apt_kernels.patch")
    assert done.returncode != 0
    assert "transformers" in done.stderr


def test_importing_is_light_and_leaves_cuda_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import apt_kernels;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "assert not new & {'transformers', 'triton', 'safetensors', 'numpy'}, new;"
        "assert not torch.cuda.is_initialized()"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    done = run("import apt_kernels; [getattr(apt_kernels, name) for name in apt_kernels.__all__]")
    assert done.returncode == 0, done.stderr
