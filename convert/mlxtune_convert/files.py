"""Files and folders that appear whole or not at all, on the disk too, and readable errors from the file system."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.sizes import size

# What macOS itself leaves in a folder that a person sees as empty: view settings, a folder's own icon, and, on volumes
# that cannot hold extended attributes, a file with these beside each file (._name).
OF_MACOS, BESIDE = (".DS_Store", ".localized", "Icon\r"), "._"
# One of these is in every model, adapter and export; the others may be beside it. What else a folder holds is not ours,
# and --force replaces no folder of it.
MADE = ("config.json", "adapter_config.json", "*.safetensors", "*.gguf")
BESIDE_MADE = (
    *("*.safetensors.index.json", "*_config.json", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
    *("chat_template.json", "additional_chat_templates", "mlxtune_*.json", "README.md"),
    *("LICENSE*", "NOTICE*", "Modelfile", "*.Modelfile", "verification.*", "*.verification.*"),
)
# How file systems say that they have no fsync (network volumes, exFAT's folders), not that it failed.
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)

# The file system's usual refusals: the reason, and what to do when it was a write that was refused.
REFUSALS = {
    errno.ENOSPC: ("the disk is full", "Free some space and run the same command again."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space and run the same command again."),
    errno.EACCES: ("permission denied", "Choose a folder you may write to."),
    errno.EPERM: ("permission denied", "Choose a folder you may write to."),
    errno.EROFS: ("the disk is read-only", "Choose a folder you may write to."),
    errno.ENOTDIR: ("a part of the path is not a folder", "Check the path."),
    errno.EISDIR: ("it is a folder", "Check the path."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one."),
}


def contents(folder: Path) -> list[Path]:
    """What a folder holds, without what macOS itself leaves there."""
    return [path for path in folder.iterdir() if path.name not in OF_MACOS and not path.name.startswith(BESIDE)]


def matching(folder: Path, pattern: str) -> list[Path]:
    """The paths in a folder that a glob pattern matches, by name; not macOS's ._name beside one. None where there is no
    such folder.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(BESIDE))


def refuse_links_out(folder: Path) -> None:
    """Raise UserError for a link that leads out of a model's or an adapter's folder: what it leads to would be copied,
    exported and pushed with it. The hub's cache is made of links: its snapshots lead to its own `blobs`. Raises it too
    for what is neither file nor folder: who reads a named pipe waits for ever.
    """
    if not folder.is_dir():
        return
    inside = folder.resolve()
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        target = path.resolve()
        of_the_hub = target.parent.name == "blobs" and inside.is_relative_to(target.parent.parent)
        if not target.is_relative_to(inside) and not of_the_hub:
            raise UserError(
                f"{path} is a link that leads out of the folder",
                "Put the file itself there, if it belongs to the model.",
            )
        refuse_special(target)


def refuse_special(path: Path) -> None:
    """Raise UserError for a named pipe, a device or a socket, which may have no end, or wait for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder", "Put an ordinary file there, or remove it.")


def holds_something(path: Path) -> bool:
    """Whether there is a file, or a folder with more in it than what macOS itself leaves there."""
    return bool(contents(path)) if path.is_dir() else path.exists()


def refuse_existing(path: Path, force: bool, sources: Sequence[Path] = ()) -> None:
    """Raise UserError when `path` holds something and `force` was not given.

    Replacing it is refused even then when one of `sources`, or the folder the user is in, would go with it, and when a
    folder holds what no command of ours writes.
    """
    if not path.exists():
        return
    place = path.resolve()
    for source in sources:
        if source.resolve().is_relative_to(place):
            what = "is the source itself" if source.resolve() == place else f"holds the source {source}"
            raise UserError(f"{path} {what}", f"Choose another {_kind(path)}.")
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{path} is the folder you are in, or holds it", "Name a new folder.")
    if holds_something(path) and not force:
        other = not_ours(path)
        hint = "" if other else ", or add --force to replace it"
        raise UserError(f"{path} already exists", f"Choose another {_kind(path)}{hint}.")
    if other := not_ours(path):
        raise UserError(
            f"{path} holds {other}, which mlxtune did not write: --force replaces models, adapters and exports alone",
            "Choose another folder.",
        )


def _kind(path: Path) -> str:
    """What to choose another of, in a hint."""
    return "folder" if path.is_dir() else "name"


def not_ours(path: Path) -> str:
    """The name of something in a folder that no model, adapter or export of ours holds; "" where there is none, and for
    a file.
    """
    if not path.is_dir() or path.is_mount():
        return "a whole volume" if path.is_mount() else ""
    from mlxtune_convert.hf import companions  # it needs this module

    there = contents(path)
    names = [*MADE, *BESIDE_MADE, *companions.VOCABULARIES]
    with contextlib.suppress(UserError):  # settings that are none
        names += [companions.CODE] if companions.code_of(path) else []  # copied because it was asked for
    for entry in sorted(there):
        is_folder = entry.is_dir() and not entry.is_symlink()
        known = any(fnmatchcase(entry.name, name) for name in names)
        if not known or (is_folder and entry.name != "additional_chat_templates"):
            return entry.name
    if there and not any(fnmatchcase(entry.name, name) for entry in there for name in MADE):
        return there[0].name
    return ""


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError when the disk that will hold `folder` has fewer than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"not enough disk space for {folder}: about {size(needed)} needed, {size(free)} free",
            "Free some space or choose a folder on another disk.",
        )


@contextlib.contextmanager
def new_folder(
    destination: Path, force: bool = False, sources: Sequence[Path] = (), own: bool = False
) -> Iterator[Path]:
    """Yield a temporary folder beside `destination`; rename it into place only if the body succeeds.

    An exception (Ctrl-C included) leaves `destination` as it was and nothing beside it. With `force`, what was there is
    removed only after the new folder is complete. sources: what the body reads; none of it is ever replaced; own: it
    has a name that only we give, inside a folder of ours, and is replaced whatever it holds. Raises UserError for an
    existing destination, a full disk or a folder that cannot be written.
    """
    if not own:
        refuse_existing(destination, force, sources)
    if destination.is_file():
        raise UserError(f"{destination} is a file", "Name a folder: one will be made.")
    work, replaced = _beside(destination, "partial"), _beside(destination, "old")
    try:
        with explained(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir()
            yield work
            for written in sorted(work.rglob("*")):
                flush(written)
            flush(work)
            if destination.exists():
                os.replace(destination, replaced)
            os.replace(work, destination)
            flush(destination.parent)
    except UserError as error:
        # The temporary name means nothing to whoever reads the message.
        raise UserError(error.message.replace(work.name, destination.name), error.hint) from error
    finally:
        if replaced.exists() and not destination.exists():  # stopped between the two renames
            os.replace(replaced, destination)
        _remove(work)
        _remove(replaced)


@contextlib.contextmanager
def new_file(destination: Path, force: bool = False, sources: Sequence[Path] = ()) -> Iterator[IO[str]]:
    """Yield a temporary text file beside `destination`; rename it into place only if the body succeeds.

    Raises UserError as `new_folder` does.
    """
    refuse_existing(destination, force, sources)
    work = _beside(destination, "partial")
    try:
        with explained(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                yield file
            flush(work)
            os.replace(work, destination)
            flush(destination.parent)
    finally:
        _remove(work)


@contextlib.contextmanager
def new_artefact(destination: Path, main: str, force: bool = False, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """As `new_folder`; but a `destination` that ends as `main` does becomes that one file, and whatever else the body
    writes lies beside it as <stem>.<name>.
    """
    if destination.suffix != Path(main).suffix:
        with new_folder(destination, force, sources) as work:
            yield work
        return
    refuse_existing(destination, force, sources)
    if destination.is_dir():
        raise UserError(f"{destination} is a folder", "Name a new file, or a folder without the ending.")
    folder = _beside(destination, "parts")
    try:
        with explained(destination), new_folder(folder) as work:
            yield work
            places = {}
            for file in sorted(work.iterdir(), key=lambda file: file.name == main):  # the main one last
                places[file] = destination if file.name == main else destination.with_suffix(f".{file.name}")
            for place in places.values():
                refuse_existing(place, force)
            for file in places:
                flush(file)
            for file, place in places.items():
                os.replace(file, place)
            flush(destination.parent)
    finally:
        _remove(folder)


def _beside(path: Path, what: str) -> Path:
    """A name beside a path that nobody can foresee: in a folder that others write to, a link could wait under it."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk, so that a power cut cannot take it back. Windows
    cannot flush folders and needs no help with files.
    """
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        flush_open(handle)
    finally:
        os.close(handle)


def flush_open(handle: int) -> None:
    """As `flush`, of an open file.

    On macOS fsync leaves data in the drive's own cache; F_FULLFSYNC does not. File systems that know neither are left
    alone; an fsync that failed (a full disk, a broken one) raises OSError.
    """
    import fcntl

    with contextlib.suppress(OSError):
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def _remove(path: Path) -> None:
    """Take a file or folder away, if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the file system's usual refusals to write into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        reason, hint = REFUSALS[error.errno]
        raise UserError(f"cannot write {error.filename or path}: {reason}", hint) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError naming file and line of what is wrong."""
    refuse_special(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}", f"Expected {what}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", f"Expected {what}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (invalid UTF-8 at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg})") from error
    except RecursionError:
        raise UserError(f"{path}: its lists and objects lie too deep in one another to be read") from None
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{path}: a number in it is too long to be read") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields for JSON, which has no NaN and no infinity: None stands for these."""
    return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in fields.items()}


def digest(path: Path, kind: str = "sha256") -> str:
    """The hash of a file's bytes, in hexadecimal digits. kind: a name that hashlib knows. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")


def json_text(value: Any, **how: Any) -> str:
    """JSON with its letters as they are; all of them escaped where a text holds half of a character, "\\ud800", which
    JSON can spell and UTF-8 cannot. how: of json.dumps.
    """
    text = json.dumps(value, ensure_ascii=False, **how)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **how)
    return text
