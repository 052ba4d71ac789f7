"""Uploads to the hub: what models and data sets have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from traceir.data.report import size
from traceir.errors import InputError, TraceError

# What the hub's client raises where there is no network; which HTTP package it uses has changed before.
_NETWORK: Final = (OSError, *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"))


def check_name(repo: str) -> None:
    """Raises InputError for what is no name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--repo {repo!r} is no name of the hub; write OWNER/NAME ({error})") from error


def upload(
    folder: Path,
    files: Sequence[tuple[str, int]],
    repo: str,
    kind: Literal["model", "dataset"],
    *,
    private: bool,
    dry_run: bool,
    revision: str | None,
) -> str:
    """Uploads these files (name, bytes) of a folder and returns the address of the commit.

    With `dry_run` it needs no network and returns what would go. The token is the one that `hf auth login` or HF_TOKEN has set;
    it is never read here. Raises TraceError where the hub refuses or cannot be reached; the upload can then be repeated.
    """
    if dry_run:
        target = f"{kind} {repo}{f' at {revision}' if revision else ''} ({'private' if private else 'public'})"
        total = f"in {len(files)} files would go to the {target}; nothing was uploaded"
        lines = [*files, (total, sum(count for _, count in files))]
        return "\n".join(f"{size(count):>10}  {name}" for name, count in lines)
    api = HfApi()
    try:
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        if private and not api.repo_info(repo, repo_type=kind).private:
            raise TraceError(f"{repo} exists and is public, not private as asked for; make it private or choose another name")
        if revision:
            api.create_branch(repo, repo_type=kind, branch=revision, exist_ok=True)
        names = [name for name, _ in files]
        commit = api.upload_folder(
            repo_id=repo, repo_type=kind, folder_path=folder, allow_patterns=names, revision=revision,
            commit_message="Upload by traceir",
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = f" ({error.server_message or type(error).__name__}); try again later"
        if status in (401, 403, 404):
            advice = "; log in by `hf auth login` with a token that may write there, then push again"
        raise TraceError(f"{repo}: the hub answers {status or 'nothing'}{advice}") from error
    except _NETWORK as error:
        raise TraceError(
            f"{repo}: the hub cannot be used from here ({type(error).__name__}: {error}); log in by `hf auth login`, check the "
            "network and HF_HUB_OFFLINE, then push again, or look at what would go with --dry-run"
        ) from error
    return str(commit.commit_url)
