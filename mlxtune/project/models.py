"""Models that are on this machine already: in the hub's cache, and in the folders of LM Studio and Ollama.

Nothing is asked of a network, and no weight is read: a model is told by its config.json, or by the name of its file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune_convert.files import BESIDE, matching

LARGEST_JSON = 1 << 20  # bytes of a config.json or a manifest that are read
GENERATES = ("ForCausalLM", "ForConditionalGeneration")  # how the class of a model that writes text is called
OLLAMA_MODEL = "application/vnd.ollama.image.model"  # a layer of its manifests that is a GGUF file


@dataclass(frozen=True)
class Local:
    """A model on this machine."""

    named: str  # as `--model` or `convert` takes it: a hub id, a folder, or a GGUF file
    called: str  # for people
    of: str  # whose folder it is in
    kind: str  # what its weights are, in words
    bytes: int  # of the weights
    is_gguf: bool = False  # to be converted before it can be trained


def local_models() -> list[Local]:
    """Those that could be trained on, the smallest first."""
    found = [*_of_hub(), *_of_lm_studio(), *_of_ollama()]
    return sorted(found, key=lambda model: (model.is_gguf, model.bytes, model.called))


def _of_hub() -> Iterator[Local]:
    from huggingface_hub import constants

    for folder in _folders(Path(os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE))):
        owner, _, name = folder.name.removeprefix("models--").partition("--")
        if not folder.name.startswith("models--") or not name:
            continue
        commit = _text(folder / "refs" / "main")
        snapshot = folder / "snapshots" / commit.strip()
        if commit and (model := _of_folder(snapshot, f"{owner}/{name}", f"{owner}/{name}", "the hub's cache")):
            yield model


def _of_lm_studio() -> Iterator[Local]:
    """PUBLISHER/MODEL/ with MLX weights, or with GGUF files."""
    for top in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        for publisher in _folders(top):
            for folder in _folders(publisher):
                called = f"{publisher.name}/{folder.name}"
                if model := _of_folder(folder, str(folder), called, "LM Studio"):
                    yield model
                for file in matching(folder, "*.gguf"):
                    if file.is_file() and "mmproj" not in file.name:  # what turns pictures into tokens
                        yield Local(
                            str(file), f"{called}/{file.name}", "LM Studio", "GGUF", file.stat().st_size, is_gguf=True
                        )


def _of_ollama() -> Iterator[Local]:
    """Its manifests name the file of each model by its digest. `convert` wants the ending .gguf, which these lack."""
    top = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    for host in _folders(top / "manifests"):
        for owner in _folders(host):
            for model in _folders(owner):
                for manifest in _files(model):
                    layers = _json(manifest).get("layers")
                    for layer in layers if isinstance(layers, list) else []:
                        if isinstance(layer, dict) and layer.get("mediaType") == OLLAMA_MODEL:
                            blob = top / "blobs" / str(layer.get("digest", "")).replace(":", "-")
                            if blob.is_file():
                                called = f"{model.name}:{manifest.name}"
                                yield Local(str(blob), called, "Ollama", "GGUF", blob.stat().st_size, is_gguf=True)


def _of_folder(folder: Path, named: str, called: str, of: str) -> Local | None:
    """A folder with config.json and safetensors of a model that writes text; None for any other."""
    files = _files(folder)
    weights = [path for path in files if path.suffix == ".safetensors" and not path.name.startswith(BESIDE)]
    config = _json(folder / "config.json")
    classes = config.get("architectures")
    if not weights or not config or not any("tokenizer" in path.name for path in files):
        return None
    if isinstance(classes, list) and not any(str(name).endswith(GENERATES) for name in classes):
        return None
    quantization = config.get("quantization")
    kind = "16 bits"
    if isinstance(quantization, dict):
        kind = f"MLX, {quantization.get('bits', '?')} bits"
    elif "quantization_config" in config:
        return None  # of another program
    return Local(named, called, of, kind, sum(path.stat().st_size for path in weights))


def _folders(top: Path) -> list[Path]:
    """Those in a folder, by name; none where it is not there or cannot be read."""
    try:
        return sorted(path for path in top.iterdir() if path.is_dir())
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    """Those in a folder, by name; none where it is not there or cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(LARGEST_JSON).decode()
    except (OSError, UnicodeDecodeError):
        return ""


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
