"""Tokenized rows are kept in a cache folder, and looked for there before anything is tokenized.

The name of a store is a key: the digest of all that its content depends on. Those are the bytes of the data file and
the names of its columns, whether its rows are read to learn from preferences, the tokenizer with its template, the
options that change examples, the release of transformers (which prints the templates) and, where the template prints
the date, the day. Anything else may differ: the same bytes under another name are the same store.

A store that is found is checked before it is used: all files are there and hold what was written, by digest. Whatever
is not so is made again. The folder counts only when nobody else can write into it: ids are read by number from anywhere
in memory, so a store that another user made is not trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from datetime import date
from pathlib import Path

from mlxtune_convert.files import new_folder

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.dataset.sources import Source
from mlxtune.data.dataset.store import NAMES, Store, is_as_written, open_store
from mlxtune.data.dataset.store_writing import Progress, write_store
from mlxtune.errors import UserError

VERSION = 9  # of the files made from the same data: raised when parsing, rendering or their layout changes
KEPT_SECONDS = 30 * 24 * 3600  # how long a store that is not used stays in the cache folder
NAME = re.compile("[0-9a-f]{32}")  # of a store in the cache folder
OPTIONS = ("max_tokens", "train_on", "expand_turns", "template", "template_kwargs", "order")  # of data, that matter


def store_of(source: Source, renderer: Renderer, progress: Progress) -> Store:
    """The examples of one file: of the cache where it has them, else made now, and kept where that may be.

    Raises UserError as `write_store` does.
    """
    folder = _place(source, renderer)
    if folder is None:
        return _made_for_now(source, renderer, progress)
    store = _kept(folder)
    if store is None:
        with new_folder(folder, own=True) as work:
            write_store(work, source.name, source.read(), renderer, progress)
        _prune(folder.parent)
        store = open_store(folder)
    os.utime(folder)
    store.facts.file = source.name  # the same bytes may have had another name
    return store


def cache_folder(section: DataSection) -> Path | None:
    """Where stores are kept; None: nowhere."""
    if section.cache == "off":
        return None
    if section.cache != "auto":
        return Path(section.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxtune" / "rows"


def _place(source: Source, renderer: Renderer) -> Path | None:
    """The folder of a file's store, there or not; None: it cannot be kept."""
    root = cache_folder(renderer.section)
    if root is None:
        return None
    content = source.digest()
    if not content or not _writable(root):
        return None
    return root / _key(content, renderer)


def _made_for_now(source: Source, renderer: Renderer, progress: Progress) -> Store:
    """A store in a temporary folder, which goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="mlxtune-"))
    try:
        write_store(folder, source.name, source.read(), renderer, progress)
        store = open_store(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(store, shutil.rmtree, folder, True)
    return store


def _writable(folder: Path) -> bool:
    """Whether stores may be kept here: the folder is there, or could be made, and nobody else can change it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return False
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return os.access(folder, os.W_OK)


def _kept(folder: Path) -> Store | None:
    """The store in a folder of the cache; None where there is none, or it does not hold what was written."""
    if folder.is_symlink() or not all((folder / name).is_file() for name in NAMES):
        return None
    try:
        store = open_store(folder)
        return store if is_as_written(folder, store) else None
    except (UserError, OSError, ValueError, KeyError, TypeError):  # torn, or written by something else
        return None


def _key(content: str, renderer: Renderer) -> str:
    """The name of a store. content: `Source.digest`."""
    from transformers import __version__ as release  # what prints the templates

    tokenizer, section = renderer.tokenizer, renderer.section
    known = [VERSION, content, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, str(tokenizer.chat_template)]
    for option in OPTIONS:
        known.append(getattr(section, option))
    known += [section.dedup == "near", release]
    if tokenizer.chat_template is not None:
        known.append(sorted(renderer.template.named_ends))
        if renderer.template.prints_date:
            known.append(section.date or date.today().isoformat())
    return hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _prune(root: Path) -> None:
    """Remove the stores that nobody used for a while, and nothing else that lies there."""
    for folder in root.iterdir():
        if folder.is_symlink() or not NAME.fullmatch(folder.name) or not folder.is_dir():
            continue
        unused = time.time() - folder.stat().st_mtime > KEPT_SECONDS
        if unused and {path.name for path in folder.iterdir()} == NAMES:
            shutil.rmtree(folder, ignore_errors=True)
