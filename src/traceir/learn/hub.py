"""What talking to the hub has in common: names of repositories, refusals in words."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError


def refusal(repo: str, error: HfHubHTTPError) -> str:
    """Why the hub did not take an upload, and what to do."""
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403, 404):
        return f"{repo}: the hub answers {status}; log in by `hf auth login` with a token that may write there, then push again"
    return f"{repo}: the hub answers {status or 'nothing'} ({error.server_message or type(error).__name__}); try again later"
