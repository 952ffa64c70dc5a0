"""What is done to a file: in its text, its structure, its bytes, or its place in the folder."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from damaging_texts import HOSTILE, JINJA, LINES, LONG, WORDS
from mutated_models import TEXTS, VALUES
from mutated_models import _places as places  # every value of a JSON document
from test_gguf_fuzz import HUGE, mutated

MUST_SAY = "!"  # begins the words for damage of weights that no command may pass over in silence


def damage(path: Path, chance: random.Random, elsewhere: Path) -> str:
    """Damage a file; `elsewhere` is a folder of somebody else's. Returns what was done, in words."""
    if chance.random() < 0.1:
        return _place(path, chance, elsewhere)
    text = path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".jinja", ".lock") or path.name == ".lock"
    if text and chance.random() < 0.15:
        return _encoding(path, chance)
    if chance.random() < 0.15:
        return _bytes(path, chance)
    form: Callable[[Path, random.Random, Path], str] = FORMS[path.suffix]
    done = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        try:
            done.append(form(path, chance, elsewhere))
        except (TypeError, LookupError, ValueError, AttributeError):
            if not done:
                raise
            done.append("damaged already")
    return "; ".join(done)


def _place(path: Path, chance: random.Random, elsewhere: Path) -> str:
    """Something else than a file stands there."""
    what = chance.choice(
        ("fifo", "folder", "link", "link to a folder", "dangling", "zero", "null", "removed", "locked")
    )
    if what == "locked":
        path.chmod(0)
        return "no permission"
    content = path.read_bytes()
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
        (path / "own.txt").write_text("of somebody else")
    elif what == "link":
        (elsewhere / path.name).write_bytes(content)
        path.symlink_to(elsewhere / path.name)
    elif what == "link to a folder":
        path.symlink_to(elsewhere)
    elif what == "dangling":
        path.symlink_to(elsewhere / "not there")
    elif what in ("zero", "null"):
        path.symlink_to(f"/dev/{what}")
    return f"in its place: {what}"


def _encoding(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    text = data.decode("utf-8", "replace")
    what = chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "invalid", "NUL", "latin", "carriage returns"))
    if what == "invalid":
        at = chance.randrange(len(data) + 1)
        data = data[:at] + chance.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88")) + data[at:]
    elif what == "NUL":
        at = chance.randrange(len(data) + 1)
        data = data[:at] + b"\0" * chance.choice((1, 5_000)) + data[at:]
    elif what == "latin":
        data = text.replace("e", "é").encode("latin-1", "replace")
    elif what == "carriage returns":
        data = data.replace(b"\n", chance.choice((b"\r", b"\r\n", b"\x85", "\u2028".encode())))
    else:
        data = text.encode(what)
    path.write_bytes(data)
    return f"encoding: {what}"


def _bytes(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "empty already"
    what = chance.choice(("flip", "flip", "cut", "empty", "twice", "insert", "drop", "noise"))
    at, weights = chance.randrange(len(data)), path.suffix in (".safetensors", ".gguf")
    if what == "flip":
        for _ in range(chance.choice((1, 1, 8, 200))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif what == "cut":
        del data[at:]
    elif what == "empty":
        data.clear()
    elif what == "twice":
        data += bytes(data)
    elif what == "insert":
        data[at:at] = chance.randbytes(chance.choice((1, 7, 64)))
    elif what == "drop":
        del data[at : at + chance.choice((1, 8, 100))]
    else:
        data = bytearray(chance.randbytes(len(data)))
    path.write_bytes(data)
    must_say = weights and what in ("cut", "empty", "noise")
    return f"{MUST_SAY if must_say else ''}bytes: {what} at {at}"


def _value(chance: random.Random, elsewhere: Path) -> str:
    return chance.choice((*VALUES, *HOSTILE)).replace("{elsewhere}", str(elsewhere))


def change(whole: Any, chance: random.Random, elsewhere: Path) -> tuple[str, str]:
    """(the JSON text of a document with one value changed, what was done)."""
    found = list(places(whole))
    value, mark = _value(chance, elsewhere), "\ue000"
    what = chance.choice(("value", "value", "value", "drop", "key", "twice", "swap", "empty key"))
    if not found or (what == "key" and not isinstance(whole, dict)):
        return value, f"all: {value[:60]}"
    holder, key = chance.choice(found)
    old = holder[key]
    if what == "drop":
        del holder[key]
    elif what == "key" and isinstance(whole, dict):
        key = chance.choice(
            ("evil", "__class__", "\x1b]0;a", "../x", "", "auto_map", "a\nb", "quantization", "__metadata__")
        )
        whole[key] = mark
    elif what == "twice" and isinstance(holder, dict):
        holder[f"{key}{mark}"] = mark
    elif what == "swap":
        other, name = chance.choice(found)
        holder[key] = json.loads(json.dumps(other[name]))
    elif what == "empty key" and isinstance(holder, dict):
        del holder[key]
        holder[""] = old
    else:
        holder[key] = mark
    text = json.dumps(whole, ensure_ascii=True).replace(json.dumps(mark), value).replace(json.dumps(mark)[1:-1], "")
    return text, f"{what} of {key!r}: {value[:60]}" if what in ("value", "key", "twice") else f"{what} of {key!r}"


def _json(path: Path, chance: random.Random, elsewhere: Path) -> str:
    if chance.random() < 0.05:
        text = chance.choice(TEXTS)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"the file is {text[:40]!r}"
    try:
        whole = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return "damaged already"
    text, what = change(whole, chance, elsewhere)
    path.write_text(text)
    return what


def _lines(path: Path, chance: random.Random, elsewhere: Path) -> str:
    lines = path.read_text().splitlines() or [""]
    at = chance.randrange(len(lines))
    what = chance.choice(("value", "value", "value", "cut", "other", "twice", "joined"))
    if what == "value":
        try:
            lines[at], what = change(json.loads(lines[at]), chance, elsewhere)
        except (ValueError, RecursionError):
            return "damaged already"
    elif what == "cut":
        lines[at] = lines[at][: chance.randrange(len(lines[at]) + 1)]
    elif what == "other":
        lines[at] = _value(chance, elsewhere)
    elif what == "twice":
        lines[at:at] = [lines[at]]
    else:
        lines[at] += lines[at]
    path.write_text("\n".join([*lines, ""]))
    return f"line {at + 1}: {what}"


def _yaml(path: Path, chance: random.Random, elsewhere: Path) -> str:
    lines = path.read_text().splitlines() or [""]
    at = chance.randrange(len(lines))
    what = chance.choice(("word", "word", "value", "value", "line", "drop", "twice", "indent", "flow"))
    key = lines[at].partition(":")[0]
    name, word = chance.choice(list(WORDS.items()))
    if what == "word":
        what = f"{key.strip()}: {name}"
        lines[at] = f"{key}: {word}".replace("{elsewhere}", str(elsewhere))
    elif what == "value":
        value = _value(chance, elsewhere)
        what = f"{key.strip()}: {value[:60]}"
        lines[at] = f"{key}: {value}"
    elif what == "line":
        line = chance.choice(LINES).replace("{elsewhere}", str(elsewhere))
        what = f"the line {line!r}"
        lines.insert(at, line)
    elif what == "drop":
        del lines[at]
    elif what == "twice":
        lines[at:at] = [lines[at]]
    elif what == "indent":
        lines[at] = " " * chance.choice((1, 2, 3, 5_000)) + lines[at].lstrip()
    else:
        try:
            whole = yaml.safe_load(path.read_text())
            text, what = change(whole, chance, elsewhere)
        except (yaml.YAMLError, RecursionError, OverflowError, ValueError, TypeError):  # or what JSON cannot hold
            return "damaged already"
        lines = [text]
    path.write_text("\n".join([*lines, ""]))
    return f"line {at + 1}: {what}"


def _csv(path: Path, chance: random.Random, elsewhere: Path) -> str:
    text = path.read_text()
    at = chance.randrange(len(text) + 1)
    put = chance.choice(
        (
            '"',
            ",",
            "\n",
            "\r",
            "\0",
            ";",
            "\t",
            '""',
            "\x1b]0;evil\x07",
            "x" * LONG,
            ",,,,",
            "\u202e",
            "\n\n\n",
            "=cmd()",
            "\ufeff",
        )
    )
    if chance.random() < 0.3:
        text = text[:at] + text[at + chance.choice((1, 10, 50)) :]
        what = f"dropped at {at}"
    else:
        text = text[:at] + put + text[at:]
        what = f"{put[:20]!r} at {at}"
    path.write_text(text)
    return what


def _jinja(path: Path, chance: random.Random, elsewhere: Path) -> str:
    text = path.read_bytes().decode("utf-8", "surrogatepass")
    at = chance.randrange(len(text) + 1)
    if chance.random() < 0.3:
        text = text[:at] + text[at + chance.choice((1, 5, 30)) :]
        what = f"dropped at {at}"
    else:
        put = chance.choice(JINJA)
        ends = [place for place, letter in enumerate(text) if letter == "}" and text[place - 1 : place] in "%}"]
        at = chance.choice([0, len(text), at, *(place + 1 for place in ends)])
        text = text[:at] + put + text[at:]
        what = f"{put[:60]!r} at {at}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return what


def _safetensors(path: Path, chance: random.Random, elsewhere: Path) -> str:
    """The header: 8 bytes of its length, JSON of names, types, shapes and places; then the numbers."""
    data = path.read_bytes()
    if len(data) < 8 or (size := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        return "damaged already"
    body = data[8 + size :]
    try:
        header = json.loads(data[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        name = chance.choice(names)
        entry = header[name]
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return "damaged already"
    what = chance.choice(
        ("dtype", "shape", "flat", "lose", "rename", "exchange", "json", "length", "number", "number", "end")
    )
    say, text = "", ""
    if what == "dtype":
        entry["dtype"] = chance.choice(("I32", "U32", "F16", "BF16", "F64", "BOOL", "U8", "F8_E4M3", "I64", "X", "", 7))
        say = MUST_SAY if entry["dtype"] not in ("F16", "BF16", "U32") else ""
        what = f"dtype {entry['dtype']}"
    elif what == "shape":
        entry["shape"] = chance.choice((shape[::-1], [*shape, 1], [1, *shape], [-1], [0], [1 << 62, 4], [], "x", None))
        what = f"shape {shape} is {entry['shape']}"
    elif what == "flat":
        entry["shape"] = [end - begin]
        entry["dtype"] = "U8"
    elif what == "lose":
        body = body[:begin] + body[end:]
        del header[name]
        for other in header.values():
            with contextlib.suppress(TypeError, LookupError, ValueError):  # damaged before
                start, stop = other["data_offsets"]
                if start >= end:
                    other["data_offsets"] = [start - (end - begin), stop - (end - begin)]
        say = MUST_SAY
    elif what == "rename":
        put = chance.choice(
            ("evil", f"{name}x", "model." + name, "\x1b]0;a\x07", "../x", "", name.upper(), "a\nb", "x" * LONG)
        )
        header[put] = header.pop(name)
        what = f"renamed {put[:30]!r}"
        say = MUST_SAY
    elif what == "exchange":
        other = chance.choice(names)
        header[name], header[other] = header[other], header[name]
        what = f"exchanged with {other}"
    elif what == "json":
        text, what = change(header, chance, elsewhere)
    elif what == "length":
        size = chance.choice((*HUGE, size - 1, size + 8))
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        return f"header length {size}"
    elif what == "number":
        value = chance.choice((float("nan"), float("inf"), 1e38, -0.0))
        words = (end - begin) // 4
        at = begin + 4 * chance.randrange(max(1, words))
        count = chance.choice((1, words - (at - begin) // 4))
        body = body[:at] + struct.pack("<f", value) * count + body[at + 4 * count :]
        what = f"{count} numbers are {value}"
    else:
        body += chance.randbytes(chance.choice((1, 8, 4096)))
    made = (text or json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + body)
    return f"{say}{name}: {what}"


def _gguf(path: Path, chance: random.Random, elsewhere: Path) -> str:
    kinds = {
        "byte": range(256),
        "count": HUGE,
        "type": range(42),
        "cut": [0],
        "insert": range(40),
        "drop": range(1, 40),
    }
    what = chance.choice(list(kinds))
    at, value = chance.randrange(1 << 16), chance.choice(list(kinds[what]))
    data = path.read_bytes()
    path.write_bytes(mutated(data, [(what, at, value)], chance.choice((1_500, 3_000, len(data)))))
    return f"{MUST_SAY if what == 'cut' else ''}{what} {value} at {at}"


def _parquet(path: Path, chance: random.Random, elsewhere: Path) -> str:
    """The footer says where everything is; its length stands before the last four bytes."""
    data = bytearray(path.read_bytes())
    if len(data) < 12:
        return "damaged already"
    what = chance.choice(("flip", "flip", "count", "footer", "length", "drop"))
    size = min(len(data) - 8, max(1, struct.unpack("<I", data[-8:-4])[0]))
    first = len(data) - 8 - size
    at = chance.randrange(first, len(data) - 8) if chance.random() < 0.6 or first < 8 else chance.randrange(4, first)
    if what == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif what == "count":  # a number of the Thrift format, seven bits a byte
        data[at : at + 5] = chance.choice((b"\xff\xff\xff\xff\x0f", b"\xfe\xff\xff\xff\x07", b"\x80\x80\x80\x80\x10"))
    elif what == "footer":
        data[first : len(data) - 8] = chance.randbytes(size)
    elif what == "length":
        data[-8:-4] = struct.pack("<I", chance.choice((0, 1, size - 1, size + 1, 0x7FFFFFFF, 0xFFFFFFFF)))
    else:
        del data[at : at + chance.choice((1, 4, 40))]
    path.write_bytes(data)
    return f"{what} at {at}"


FORMS: dict[str, Callable[[Path, random.Random, Path], str]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".yaml": _yaml,
    ".csv": _csv,
    ".jinja": _jinja,
    ".safetensors": _safetensors,
    ".gguf": _gguf,
    ".parquet": _parquet,
    "": _csv,
}
