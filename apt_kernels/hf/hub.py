"""Adapters in a repository of the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import AdapterError

_LOG = logging.getLogger(__name__)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(source) -> bool:
    """Whether ``source`` has the form ``owner/name`` and no local file or folder has this path."""
    found = isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None
    return found and source[0] != "." and not Path(source).exists()


def fetch(repo_id, files: list[str], revision: str | None) -> Path:
    """The local folder with ``files`` of the repository, downloaded unless they are in huggingface_hub's cache."""
    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=files)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise AdapterError(
            f"{repo_id!r} is no folder here, and could not be read from the Hugging Face hub{at}: {_said(error)}"
        ) from error
    _LOG.info("adapter read from the Hugging Face hub: %s", repo_id)
    return Path(folder)


def publish(folder: Path, files: list[str], repo_id: str, private: bool | None, message: str | None) -> None:
    """Upload ``files`` of ``folder`` to the repository in one commit; it is created if it does not exist."""
    try:
        made = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=getattr(made, "repo_id", repo_id),
            folder_path=folder,
            allow_patterns=files,
            commit_message=message or "Upload an apt_kernels adapter",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(
            f"{repo_id!r} could not be written on the Hugging Face hub: {_said(error)}. Log in with `hf auth login`, "
            "or save to a folder"
        ) from error
    _LOG.info("adapter written to the Hugging Face hub: %s", repo_id)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
