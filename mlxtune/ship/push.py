"""An export's way to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from mlxtune.errors import UserError

REPO = re.compile(r"[\w.-]+/[\w.-]+")  # a repository's id: USER/NAME


def check_repo(repo: str, public: bool) -> None:
    """Raise UserError before any work when an upload could not begin, or would be seen by more people than asked."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    if not REPO.fullmatch(repo):
        raise UserError(f"--push {repo}: a repository on the hub looks like USER/NAME")
    if constants.is_offline_mode():
        raise UserError("--push needs the hub, and HF_HUB_OFFLINE is set", "Unset it, or leave --push out.")
    if not get_token():
        raise UserError("--push needs a login", "Log in first: hf auth login (or set HF_TOKEN).")
    try:
        _require_asked_for(repo, bool(HfApi().repo_info(repo).private), public)
    except RepositoryNotFoundError:
        return  # it will be made
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise UserError(
            f"--push {repo}: the hub cannot be asked who sees it ({' '.join(str(error).split())[:200]})",
            "Try again later, or leave --push out.",
        ) from error


def _require_asked_for(repo: str, private: bool, public: bool) -> None:
    if not private and not public:
        raise UserError(
            f"--push {repo}: this repository is public, everyone would see the export",
            "Choose another one, make it private on the hub, or add --public.",
        )
    if private and public:
        raise UserError(f"--push {repo}: this repository is private", "Leave --public out, or make it public first.")


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload a folder to a repository of the hub, made if there is none; return its address and who sees it, as the hub
    says.

    Raises UserError when the hub refuses or cannot be reached, or would show it to more people than asked; the folder
    stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        # Of a repository that is there already the hub ignores `private`, and says nothing.
        address = api.create_repo(repo, private=not public, exist_ok=True, repo_type="model")
        private = bool(api.repo_info(repo).private)
        _require_asked_for(repo, private, public)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from mlxtune")
    except (HfHubHTTPError, HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        why = {401: "it does not accept your token", 403: "your token may not write there"}.get(status, str(error))
        raise UserError(
            f"the export is in {folder}, but the hub did not take it as {repo}: {' '.join(why.split())[:200]}",
            "Log in with a token that may write: hf auth login; then run the command again with --force.",
        ) from error
    return f"{address}: {'private' if private else 'public'}"
