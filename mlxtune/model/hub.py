"""What a user means by SRC: a path, or a hub id of a model or a PEFT adapter.

Takes safetensors weights only, and works without a network from the hub's own cache. The weights are fetched here, into
that cache: huggingface_hub starts a file again from its first byte when the command that fetched it was cut off.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mlxtune_convert.files import MIB, explained, require_space

from mlxtune.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = re.compile(r"model.*\.safetensors")
ADAPTER = "adapter_model.safetensors"
PATTERNS = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.txt", ADAPTER]


def resolve(source: str) -> Path:
    """A local folder or file as it is, a hub id as the folder of its download.

    Raises UserError: nothing there, unknown on the hub, gated, no network and not in the cache, no safetensors, a cut
    or damaged download, a full disk.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(source) or source.startswith((".", "~")) or path.suffix in (".gguf", ".safetensors"):
        raise UserError(f"no file or folder {source}", "A hub id looks like owner/name.")
    return _download(source)


@functools.cache
def _download(name: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import disable_progress_bars

    offline = constants.is_offline_mode()
    try:
        with explained(Path(constants.HF_HUB_CACHE)):
            if not offline:
                # Without a timeout of its own this request waits for ever.
                info = HfApi().model_info(name, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                _fetch_weights(name, info)
            if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
                disable_progress_bars()  # what is left are small files
            return Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=offline))
    except HFValidationError as error:
        raise UserError(f"no file or folder {name}, and no model on the hub can have that name") from error
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        return _cached_or_explain(name, error, offline)


@dataclass(frozen=True)
class _Missing:
    """A weight file that the cache does not have: where it is, and where in the cache it belongs."""

    name: str
    url: str
    blob: Path
    size: int

    @property
    def part(self) -> Path:
        """What has arrived of it so far."""
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0


def _fetch_weights(name: str, info: ModelInfo) -> None:
    """Put the weights into the hub's cache, where snapshot_download finds them. Refuse what cannot be used or kept."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import WeakFileLock

    files = info.siblings or []
    weights = [file for file in files if WEIGHTS.fullmatch(file.rfilename)]
    weights = weights or [file for file in files if file.rfilename == ADAPTER]
    if not weights:
        pickled = [file.rfilename for file in files if file.rfilename.endswith((".bin", ".pt", ".pth"))]
        why = f": only pickled weights ({pickled[0]}), which are never loaded" if pickled else ""
        raise UserError(f"{name} has no model*.safetensors{why}", "Choose a repository with safetensors weights.")
    cache = Path(constants.HF_HUB_CACHE)
    folder = f"models--{name.replace('/', '--')}"  # the cache's documented layout, like blobs/ and .locks/
    missing = [
        _Missing(
            file.rfilename,
            hf_hub_url(name, file.rfilename, revision=info.sha),
            cache / folder / "blobs" / file.lfs.sha256,
            file.lfs.size,
        )
        for file in weights
        if file.lfs and not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
    ]
    missing = [file for file in missing if not file.blob.exists()]
    if not missing:
        return
    require_space(cache, sum(file.size - file.arrived for file in missing))
    locks = cache / ".locks" / folder
    for place in (locks, cache / folder / "blobs"):
        place.mkdir(parents=True, exist_ok=True)
    for file in missing:
        with WeakFileLock(locks / f"{file.blob.name}.lock"):  # another command may be fetching the same file
            if not file.blob.exists():
                _fetch(name, file)


def _fetch(name: str, file: _Missing) -> None:
    """Download one file from where an earlier command stopped, and prove by its checksum that it is the hub's."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    try:
        with file.part.open("ab") as part:
            http_get(
                file.url,
                part,
                resume_size=part.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
            )
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        here = f"{file.arrived / MIB:,.1f} of {file.size / MIB:,.1f} MiB"
        raise UserError(
            f"the download of {name} stopped: {here} of {file.name} are here",
            "Run the same command again: it continues there.",
        ) from error
    with file.part.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != file.blob.name:
            file.part.unlink()
            raise UserError(f"{file.name} of {name} arrived damaged and was thrown away", "Run the same command again.")
    os.replace(file.part, file.blob)


def _cached_or_explain(name: str, error: Exception, offline: bool) -> Path:  # noqa: RET503 (_refuse never returns)
    """Without a network the cached copy serves; any other refusal becomes one line."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        _refuse(
            f"{name} is gated", "Accept its terms on its page, then log in: hf auth login (or set HF_TOKEN).", error
        )
    if status == 401 and "Invalid credentials" in str(error):
        _refuse("the hub does not accept your token", "Log in again: hf auth login (or correct HF_TOKEN).", error)
    if isinstance(error, RepositoryNotFoundError) or status == 401:  # without a login the hub hides what is missing
        _refuse(
            f"no model {name} on the hub, and no folder of that name here",
            "Check the spelling; a private one needs: hf auth login.",
            error,
        )
    if 0 < status < 500:
        _refuse(f"the hub refused {name} (HTTP {status})", "", error)
    try:
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=True))
    except Exception:
        folder = None
    if folder is not None and (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        return folder
    if folder is not None and (folder / ADAPTER).is_file():
        return folder
    if offline:
        _refuse(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE is set",
            "Unset it once to download the model.",
            error,
        )
    _refuse(
        f"cannot reach the hub for {name}, and the local cache does not have it whole",
        "Run the same command again with a network: the download continues where it stopped.",
        error,
    )


def _refuse(message: str, hint: str, error: Exception) -> NoReturn:
    raise UserError(message, hint) from error
