"""The code of README.md runs where the wheel was installed, in an empty folder."""

from helpers import distribution, documentation


def test_the_readme_runs_with_the_wheel_alone(substitutions, tmp_path):
    tree = distribution.copy(tmp_path / "tree")
    python = distribution.install(distribution.build(tree, "wheel"), tmp_path / "environment")
    code = "".join(block for _, block in documentation.python_blocks(documentation.ROOT / "README.md"))
    for written, replacement in substitutions:
        code = code.replace(written, replacement)
    (tmp_path / "empty").mkdir()
    code = f"import torch; torch.manual_seed(0)\n{code}\nprint(apt_kernels.__file__, loss.item())"
    module, loss = distribution.run(tmp_path / "empty", code, python)[0].split()
    assert module.startswith(str(tmp_path / "environment"))
    assert float(loss) < 0.35
    assert sorted(path.name for path in (tmp_path / "empty" / "adapter").iterdir()) == [
        "adapter.safetensors",
        "apt_config.json",
    ]
