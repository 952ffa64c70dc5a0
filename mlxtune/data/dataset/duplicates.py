"""Equal and nearly equal rows.

Near duplicates: MinHash signatures (Broder 1997) of three-word shingles, compared within buckets of a
locality-sensitive hash (Indyk and Motwani 1998).

    the old man and the sea     shingles: the old man, old man and, man and the, and the sea
    the old man and the boat    shingles: the old man, old man and, man and the, and the boat

They share 3 of 5 shingles: a similarity of 0.6. Each entry of a signature is the smallest hash of all shingles, by a
hash function of its own: in two rows of that similarity it is the same with a probability of 0.6. Rows are compared
only where they agree in all entries of some band, so that not every pair has to be.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxtune.data.rows.formats import Record

HASHES = 32  # entries of a signature
BAND = 4  # entries that must all agree for two rows to be compared: 8 bands catch 1 - (1 - 0.8**4)**8 = 98% at SIMILAR
SIMILAR = 0.8  # share of shingles in common from which two rows count as near duplicates
_WORD = re.compile(r"\w+")
CHUNK = 1 << 16  # rows that are compared at once: 8 MB of signatures
# The hash functions, the same for ever: signatures are kept. Each is factor * shingle + shift, its high bits.
_draw = np.random.default_rng(0)
_FACTORS = _draw.integers(1, 2**61, HASHES, np.uint64) | np.uint64(1)
_WEIGHTS = _draw.integers(1, 2**61, 3, np.uint64) | np.uint64(1)
_SHIFTS = _draw.integers(0, 2**61, HASHES, np.uint64)


def content_hash(record: Record) -> int:
    """64 bits: equal for rows with equal content."""
    content: list[Any] = [record.messages, record.tools, record.text]
    if record.side:  # a good answer is not a bad one
        content.append(int(record.side))
    return hash_of(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str))


def hash_of_row(records: Sequence[Record]) -> int:
    """64 bits, of all that one row holds: of a pair the prompt and both answers."""
    if len(records) == 1:
        return content_hash(records[0])
    return hash_of(" ".join(str(content_hash(record)) for record in records))


def asked_hash(record: Record) -> int:
    """64 bits, by which a row is held out of training: equal for equal rows, and for answers to one prompt of which
    some are preferred, since what is learnt of one answer tells of the others.
    """
    if not record.side:
        return content_hash(record)
    prompt = (record.messages or [])[: record.prompt]
    return hash_of(json.dumps([prompt, record.tools], sort_keys=True, ensure_ascii=False, default=str))


def question_hash(record: Record) -> int:
    """64 bits of what is said before the first answer, but for the system prompt, which many rows share; of a text, of
    all of it. Case and spaces do not count.
    """
    said = []
    for message in record.messages or [{"role": "text", "content": record.text}]:
        if message["role"] == "assistant":
            break
        if message["role"] not in ("system", "developer"):
            said.append(" ".join(str(message.get("content") or "").casefold().split()))
    return hash_of(json.dumps(said))


def hash_of(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def words_of(record: Record) -> list[str]:
    """What a row says: not the system prompt, which many rows share, but tool calls and thinking too."""
    texts = [record.text or ""]
    for message in record.messages or []:
        if message["role"] in ("system", "developer"):
            continue
        for key, value in message.items():
            if key not in ("role", "instruction", "input"):
                texts.append(str(value))
    return _WORD.findall(" ".join(texts).lower())


def words_of_row(records: Sequence[Record]) -> list[str]:
    """What all records of one row say; the words of each answer of a preference are words of their own, so that a pair
    is not like the same one with its sides exchanged.
    """
    words = []
    for record in records:
        mark = record.side.word if record.side else ""
        words += [f"{mark}{word}" for word in words_of(record)]
    return words


def signature(words: list[str]) -> np.ndarray:
    """[HASHES] uint32: the share of equal entries in two signatures estimates the share of common shingles."""
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words or [""]), np.uint64)  # [words]
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        shingles = hashes  # of one or two words each is one
        if len(hashes) > 2:
            mixed = hashes[:-2] * _WEIGHTS[0] + hashes[1:-1] * _WEIGHTS[1] + hashes[2:] * _WEIGHTS[2]
            shingles = mixed >> np.uint64(20)  # the low bits of a product depend on low bits alone
        values = shingles[:, None] * _FACTORS + _SHIFTS  # [shingles, HASHES]
    return (values >> np.uint64(32)).min(axis=0).astype(np.uint32)


def near(signatures: np.ndarray) -> np.ndarray:
    """[N] the first row that each row is a near duplicate of; itself where there is none. signatures: [N, HASHES].

    A near duplicate of a near duplicate counts: all of them have the same first row.
    """
    first = np.arange(len(signatures))
    for start in range(0, HASHES, BAND):
        leader = _first_with_equal_band(signatures[:, start : start + BAND])
        for begin in range(0, len(signatures), CHUNK):
            rows = slice(begin, begin + CHUNK)
            share = (signatures[rows] == signatures[leader[rows]]).mean(axis=1)
            earlier = np.minimum(first[rows], leader[rows])
            first[rows] = np.where(share >= SIMILAR, earlier, first[rows])
    while (first != first[first]).any():
        first = first[first]
    return first


def _first_with_equal_band(band: np.ndarray) -> np.ndarray:
    """[N] the first row whose entries of a band are all equal to those of each row. band: [N, BAND] uint32."""
    as_bytes = np.ascontiguousarray(band).view(np.dtype((np.void, 4 * BAND))).ravel()
    _, first, group = np.unique(as_bytes, return_index=True, return_inverse=True)
    return first[group]
