"""What a user means by SRC: a path, or a hub id of a model or a PEFT adapter.

Takes safetensors weights only, and works without a network from the hub's own cache. The weights are fetched here, into
that cache: huggingface_hub starts a file again from its first byte when the command that fetched it was cut off.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxtune_convert.files import digest, explained, read_json, refuse_links_out, require_space
from mlxtune_convert.foreign.method import unread
from mlxtune_convert.foreign.original import instead, unquantized_name
from mlxtune_convert.hf.companions import CODE, VOCABULARIES
from mlxtune_convert.sizes import size
from mlxtune_convert.tensors import INDEX, SINGLE, read_index

from mlxtune.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = re.compile(r"model.*\.safetensors")
ADAPTER = "adapter_model.safetensors"
# What is fetched beside the weights; of the weights, only the files that are the model.
PATTERNS = list(dict.fromkeys(["*.json", "*.jinja", "*.txt", *VOCABULARIES]))


def is_id(source: str) -> bool:
    """Whether a model is one of the hub: nothing here has that name, and it looks like OWNER/NAME."""
    path = Path(source).expanduser()
    is_name = HUB_ID.fullmatch(source) and not source.startswith((".", "~"))
    return bool(is_name) and path.suffix not in (".gguf", ".safetensors") and not path.exists()


def resolve(source: str, code: bool = False, local_only: str = "") -> Path:
    """A local folder or file as it is, a hub id as the folder of its download. code: with the .py files in it, which
    nothing here runs; local_only: not "": the hub is not asked, and this is the hint where its local cache has no copy.

    Raises UserError: nothing there, unknown on the hub, gated, no network and not in the cache, no safetensors, a cut
    or damaged download, a full disk.
    """
    path = Path(source).expanduser()
    if path.exists():
        if path.is_dir():
            refuse_links_out(path)
        return path
    if not is_id(source):
        raise UserError(f"no file or folder {source}", "A hub id looks like owner/name.")
    if local_only:
        cached = _cached(source, PATTERNS)
        if cached is None:
            raise UserError(
                f"{source}, a model of the hub that only the run names, is not in the local cache", local_only
            )
        return cached
    return _download(source, code)


@functools.cache
def _download(name: str, code: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    offline = constants.is_offline_mode()
    patterns = PATTERNS + [CODE] * code
    try:
        if offline:
            raise OSError("the hub is not asked")
        with explained(Path(constants.HF_HUB_CACHE)):
            # Without a timeout of its own this request waits for ever.
            info = HfApi().model_info(name, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            _refuse_unread(name, info)
            weights = _weights(name, info)
            _fetch_weights(name, info, weights)
            if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
                disable_progress_bars()  # what is left are small files
            return Path(snapshot_download(name, allow_patterns=[*patterns, *(file.rfilename for file in weights)]))
    except HFValidationError as error:
        raise UserError(f"no file or folder {name}, and no model on the hub can have that name") from error
    except (HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        folder = None if 0 < status < 500 else _cached(name, patterns)  # without a network the cached copy serves
        if folder is None:
            raise _explained(name, error, status, offline) from error
        return folder


def _refuse_unread(name: str, info: ModelInfo) -> None:
    """Raise UserError where the hub says that a model is quantized as nobody here reads it: before its weights come."""
    settings = (info.config or {}).get("quantization_config")
    method = unread(settings) if isinstance(settings, dict) else ""
    if not method:
        return
    bases = info.card_data.base_model if info.card_data is not None else None
    raise UserError(
        f"{name} is quantized with {method}, which cannot be read",
        instead(unquantized_name([bases] if isinstance(bases, str) else bases or [])),
    )


def _weights(name: str, info: ModelInfo) -> list[RepoSibling]:
    """The weight files of a repository, as `tensors.weights_of` chooses them in a folder. Refuses one without any."""
    files = info.siblings or []
    names = {file.rfilename for file in files}
    chosen = None
    if any(file.endswith(".safetensors") for file in names):
        chosen = _chosen(names, lambda file: _small(name, file, info.sha))
    if chosen is not None:
        missing = sorted(chosen - names)
        if missing:
            raise UserError(f"{name} lacks {len(missing)} of its {len(chosen)} weight files, first {missing[0]}")
        return [file for file in files if file.rfilename in chosen]
    weights = [file for file in files if WEIGHTS.fullmatch(file.rfilename)]
    weights = weights or [file for file in files if file.rfilename == ADAPTER]
    if not weights:
        pickled = [file.rfilename for file in files if file.rfilename.endswith((".bin", ".pt", ".pth"))]
        why = f": only pickled weights ({pickled[0]}), which are never loaded" if pickled else ""
        raise UserError(f"{name} has no model*.safetensors{why}", "Choose a repository with safetensors weights.")
    return weights


def _chosen(names: set[str], read: Callable[[str], Path]) -> set[str] | None:
    """The files that are a model's weights; None where they go by their names alone. names: of all its files; read:
    the path of one of them.
    """
    chosen = next((name for name in (SINGLE, INDEX) if name in names), None)
    if "config.json" in names:
        asked = read_json(read("config.json"), "a model").get("transformers_weights")
        if isinstance(asked, str):
            chosen = asked
    if chosen is None:
        return None
    if chosen.endswith(".json"):  # an index of many files
        return set(read_index(read(chosen)).values())
    return {chosen}


def _small(name: str, file: str, revision: str | None) -> Path:
    """One small file of a repository, downloaded."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, revision=revision))


def _fetch_weights(name: str, info: ModelInfo, weights: list[RepoSibling]) -> None:
    """Put the weights into the hub's cache, where snapshot_download finds them. Refuse what cannot be kept."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    cache = Path(constants.HF_HUB_CACHE)
    folder = f"models--{name.replace('/', '--')}"  # the cache's documented layout, like blobs/ and .locks/
    blobs, locks = cache / folder / "blobs", cache / ".locks" / folder
    missing = {blobs / file.lfs.sha256: file for file in weights if file.lfs and not (blobs / file.lfs.sha256).exists()}
    if not missing:
        return
    require_space(cache, sum((file.size or 0) - _arrived(_part(blob)) for blob, file in missing.items()))
    for place in (locks, blobs):
        place.mkdir(parents=True, exist_ok=True)
    for blob, file in missing.items():
        with WeakFileLock(locks / f"{blob.name}.lock"):  # another command may be fetching the same file
            if not blob.exists():
                _fetch(name, hf_hub_url(name, file.rfilename, revision=info.sha), file, blob)


def _part(blob: Path) -> Path:
    """What has arrived of a file so far."""
    return blob.with_name(f"{blob.name}.incomplete")


def _arrived(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch(name: str, url: str, file: RepoSibling, blob: Path) -> None:
    """Download one file from where an earlier command stopped, and prove by its checksum that it is the hub's."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part, total = _part(blob), file.size or 0
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    try:
        with part.open("ab") as opened:
            http_get(
                url,
                opened,
                resume_size=opened.tell(),
                headers=headers,
                expected_size=total,
                displayed_filename=file.rfilename,
            )
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        here = f"{size(_arrived(part))} of {size(total)}"
        raise UserError(
            f"the download of {name} stopped: {here} of {file.rfilename} are here",
            "Run the same command again: it continues there.",
        ) from error
    if digest(part) != blob.name:
        part.unlink()
        raise UserError(
            f"{file.rfilename} of {name} arrived damaged and was thrown away", "Run the same command again."
        )
    os.replace(part, blob)


def _cached(name: str, patterns: list[str]) -> Path | None:
    """The copy in the hub's cache, when it is a whole model."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        names = {path.name for path in folder.iterdir()}
        weights = _chosen(names, lambda file: folder / file) or {file for file in names if WEIGHTS.fullmatch(file)}
    except Exception:  # whatever is wrong with the cache, there is no copy
        return None
    whole = "config.json" in names and bool(weights) and weights <= names
    return folder if whole or ADAPTER in names else None


def _explained(name: str, error: Exception, status: int, offline: bool) -> UserError:
    """Why there is no model. status: what the hub answered, 0 for nothing."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return UserError(
            f"{name} is gated", "Accept its terms on its page, then log in: hf auth login (or set HF_TOKEN)."
        )
    if status == 401 and "Invalid credentials" in str(error):
        return UserError("the hub does not accept your token", "Log in again: hf auth login (or correct HF_TOKEN).")
    if isinstance(error, RepositoryNotFoundError) or status == 401:  # without a login the hub hides what is missing
        return UserError(
            f"no model {name} on the hub, and no folder of that name here",
            "Check the spelling; a private one needs: hf auth login.",
        )
    if 0 < status < 500:
        return UserError(f"the hub refused {name} (HTTP {status})")
    if offline:
        return UserError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE is set", "Unset it once to download the model."
        )
    return UserError(
        f"cannot reach the hub for {name}, and the local cache does not have it whole",
        "Run the same command again with a network: the download continues where it stopped.",
    )
