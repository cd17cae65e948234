"""Adapters in vLLM: the load format ``apt_kernels``. vLLM calls `register` in every process."""


def register() -> None:
    """Add the load format to vLLM's: the entry point of the group ``vllm.general_plugins``. Safe to call again."""
    from . import loader

    loader.register()
