"""What a user means by SRC: a path, or a hub id.

Downloads are resumable, offline-aware, and take safetensors weights only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from mlxtune_convert.files import require_space

from mlxtune.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PATTERNS = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def resolve(source: str) -> Path:
    """A local folder or file as it is, a hub id as the folder of its download.

    Raises UserError: nothing there, unknown on the hub, gated, no network and not in the cache, no safetensors.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(source) or source.startswith((".", "~")) or path.suffix in (".gguf", ".safetensors"):
        raise UserError(f"no file or folder {source}", "A hub id looks like owner/name.")
    return _download(source)


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = constants.is_offline_mode()
    try:
        if not offline:
            info = HfApi().model_info(name, files_metadata=True)
            _check_files(name, {file.rfilename: file.size or 0 for file in info.siblings or []})
        return Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=offline))
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        return _cached_or_explain(name, error, offline)


def _check_files(name: str, sizes: dict[str, int]) -> None:
    from huggingface_hub import constants

    weights = {file: size for file, size in sizes.items() if re.fullmatch(r"model.*\.safetensors", file)}
    if not weights:
        pickled = [file for file in sizes if file.endswith((".bin", ".pt", ".pth"))]
        why = f": only pickled weights ({pickled[0]}), which are never loaded" if pickled else ""
        raise UserError(f"{name} has no model*.safetensors{why}", "Choose a repository with safetensors weights.")
    require_space(Path(constants.HF_HUB_CACHE), 0 if _is_cached(name) else sum(weights.values()))


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _cached_or_explain(name: str, error: Exception, offline: bool) -> Path:  # noqa: RET503 (_refuse never returns)
    """Without a network the cached copy serves; any other refusal becomes one line."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        _refuse(
            f"{name} is gated", "Accept its terms on its page, then log in: hf auth login (or set HF_TOKEN).", error
        )
    if isinstance(error, RepositoryNotFoundError):
        _refuse(
            f"no model {name} on the hub, and no folder of that name here",
            "Check the spelling; a private one needs: hf auth login.",
            error,
        )
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
        _refuse(f"the hub refused {name} (HTTP {error.response.status_code})", "", error)
    try:
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=True))
    except Exception:
        folder = None
    if folder is not None and (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        return folder
    if offline:
        _refuse(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE is set",
            "Unset it once to download the model.",
            error,
        )
    _refuse(
        f"cannot reach the hub for {name}, or the download was cut, and the local cache does not have it whole",
        "Run the same command again with a network: the download continues where it stopped.",
        error,
    )


def _refuse(message: str, hint: str, error: Exception) -> NoReturn:
    raise UserError(message, hint) from error
