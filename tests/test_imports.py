"""What `import apt_kernels` needs and does, in fresh processes; and which module may import which."""

import subprocess
import sys

import pytest

from helpers import import_graph

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


@pytest.mark.parametrize("blocked", ["matplotlib", "numpy"])
def test_without_matplotlib_the_picture_says_what_is_missing(blocked):
    """numpy is no requirement of the package: it comes with matplotlib."""
    call = "from apt_kernels.hf import plot; plot.draw(None, 'x.png', '')"
    done = run(f"import apt_kernels.hf\n{BLOCK.format(blocked=(blocked,))}\nsys.modules.pop('numpy', None)\n{call}")
    assert "ModuleNotFoundError: Probe.picture needs matplotlib: pip install matplotlib" in done.stderr


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


def test_no_import_goes_in_a_circle_or_against_the_layers():
    found = import_graph.sources()
    edges = import_graph.graph(found)
    assert len(edges) > 50
    assert sum(map(len, edges.values())) > 150
    assert import_graph.circles(edges) == []
    assert import_graph.wrong_arrows(edges) == []
    assert import_graph.wrong_packages(found) == []


IN_A_FUNCTION = "def later():\n    {}\n"
TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"


@pytest.mark.parametrize("form", ["{}\n", IN_A_FUNCTION, TYPES_ONLY], ids=["at the top", "in a function", "for types"])
@pytest.mark.parametrize(
    ("module", "planted", "arrow"),
    [
        ("hf.state", "from .checkpoint import save", "hf.state -> apt_kernels.hf.checkpoint"),
        ("hf.state", "from . import checkpoint", "hf.state -> apt_kernels.hf.checkpoint"),
        ("hf.patching", "from .integrations import trainer", "hf.patching -> apt_kernels.hf.integrations.trainer"),
        ("hf.attention.function", "from ..integrations import peft", "function -> apt_kernels.hf.integrations.peft"),
        ("hf.attention.masks", "import apt_kernels.hf.patching", "masks -> apt_kernels.hf.patching"),
        ("hf.discovery.selection", "from ..patching import patch", "selection -> apt_kernels.hf.patching"),
        ("mask", "from .impl import inputs", "mask -> apt_kernels.impl.inputs"),
        ("impl.inputs", "from ..ops.attention import attention", "inputs -> apt_kernels.ops.attention"),
        ("impl.cpu", "from ..triton import tiles", "impl.cpu -> apt_kernels.impl.triton.tiles"),
        ("impl.cpu.blocks", "from ..reference import forward", "impl.cpu.blocks -> apt_kernels.impl.reference"),
        ("impl.inputs", "from . import cpu", "impl.inputs -> apt_kernels.impl.cpu"),
        ("ops.choose", "from ..hf.patching import patch", "ops.choose -> apt_kernels.hf.patching"),
        ("hf.state", "from ..serving.vllm import register", "hf.state -> apt_kernels.serving.vllm"),
        ("serving.vllm.marker", "from ...ops import choose", "serving.vllm.marker -> apt_kernels.ops.choose"),
        ("prefix.adaptive", "from ..ops import choose", "prefix.adaptive -> apt_kernels.ops.choose"),
        ("prefix.adaptive", "import_module('apt_kernels.ops.choose')", "prefix.adaptive -> apt_kernels.ops.choose"),
        ("prefix.adaptive", "import_module('..ops.choose', __package__)", "prefix.adaptive -> apt_kernels.ops.choose"),
    ],
)
def test_a_planted_import_against_the_layers_is_noticed(module, planted, arrow, form):
    found = import_graph.sources()
    found[f"apt_kernels.{module}"] += "\n" + form.format(planted)
    (wrong,) = import_graph.wrong_arrows(import_graph.graph(found))
    assert wrong.endswith(arrow)


@pytest.mark.parametrize("form", ["{}\n", IN_A_FUNCTION, TYPES_ONLY], ids=["at the top", "in a function", "for types"])
@pytest.mark.parametrize(
    ("module", "planted", "circle"),
    [
        ("hf.events", "from .state import State", {"hf.events", "hf.state"}),
        ("hf.adapters", "from .pruning import modules", {"hf.adapters", "hf.pruning"}),
        ("impl.cpu.ranges", "from . import blocks", {"impl.cpu.ranges", "impl.cpu.blocks"}),
    ],
)
def test_a_planted_circle_is_noticed(module, planted, circle, form):
    found = import_graph.sources()
    found["apt_kernels.hf.pruning"] += "\nfrom .adapters import adapters\n"
    assert import_graph.circles(import_graph.graph(found)) == []
    found[f"apt_kernels.{module}"] += "\n" + form.format(planted)
    assert circle in [
        {name.removeprefix("apt_kernels.") for name in each} for each in import_graph.circles(import_graph.graph(found))
    ]


def test_a_module_without_a_layer_is_noticed():
    found = {**import_graph.sources(), "apt_kernels.hf.somewhere": "", "apt_kernels.elsewhere": ""}
    wrong = import_graph.wrong_arrows(import_graph.graph(found))
    assert wrong == ["apt_kernels.elsewhere has no layer", "apt_kernels.hf.somewhere has no layer"]


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("", "def later():\n    import transformers"),
        ("config", "from safetensors import torch"),
        ("ops.choose", "from peft.utils import other"),
        ("prefix.adaptive", "import accelerate.hooks as hooks"),
        ("impl.cpu", "import triton"),
        ("hf.patching", "import triton"),
        ("hf.patching", "def later():\n    import vllm"),
    ],
)
def test_a_planted_package_is_noticed(module, planted):
    found, name = import_graph.sources(), f"apt_kernels.{module}".rstrip(".")
    found[name] += f"\n{planted}\n"
    (wrong,) = import_graph.wrong_packages(found)
    assert wrong.startswith(f"{name} -> ")
