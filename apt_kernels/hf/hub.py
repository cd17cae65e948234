"""Adapters in a repository of the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import AdapterError

_LOG = logging.getLogger(__name__)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[^\s@]+)?")
README = "README.md"


def is_repository(source) -> bool:
    """Whether ``source`` is of the form ``owner/name`` or ``owner/name@revision``, and not a local path."""
    found = isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None
    return found and source[0] != "." and not Path(source).exists()


def fetch(source: str, files: list[str], revision: str | None, subfolder: str | None = None) -> Path:
    """The local folder with ``files`` of the repository, downloaded unless they are in huggingface_hub's cache."""
    repo_id, _, named = source.partition("@")
    if named and revision not in (None, named):
        raise AdapterError(f"{source!r} names a revision, and revision is {revision!r}; give one of them")
    revision = named or revision
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=[inside(subfolder, name) for name in files]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise AdapterError(
            f"{repo_id!r} is not a folder on this machine, and could not be read from the Hugging Face hub{at}: "
            f"{_said(error)}"
        ) from error
    _LOG.info("adapter read from the Hugging Face hub: %s", source)
    return Path(folder, subfolder or "")


def inside(subfolder: str | None, name: str = "") -> str:
    """The path of ``name`` in ``subfolder``. `AdapterError` unless that is a relative path without ``..``."""
    if subfolder is None:
        return name
    parts = subfolder.split("/") if isinstance(subfolder, str) else [""]
    if any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise AdapterError(f"subfolder is {subfolder!r}; it needs a relative path such as 'adapters/first'")
    return "/".join([*parts, name] if name else parts)


def publish(
    folder: Path,
    files: list[str],
    repo_id: str,
    subfolder: str | None,
    private: bool | None,
    message: str | None,
) -> None:
    """Upload ``files`` of ``folder`` to the repository in one commit; it is created if it does not exist.

    An existing README.md of the repository is kept.
    """
    try:
        made = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = getattr(made, "repo_id", repo_id)
        if huggingface_hub.file_exists(repo_id, inside(subfolder, README)):
            files = [name for name in files if name != README]
        huggingface_hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message=message or "Upload an apt_kernels adapter",
            path_in_repo=inside(subfolder) or None,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(
            f"{repo_id!r} could not be written on the Hugging Face hub: {_said(error)}. Log in with `hf auth login`, "
            "or save to a folder"
        ) from error
    _LOG.info("adapter written to the Hugging Face hub: %s", repo_id)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
