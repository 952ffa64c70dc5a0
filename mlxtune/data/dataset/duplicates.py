"""Equal and nearly equal rows.

Near duplicates: MinHash signatures (Broder 1997) of three-word shingles, compared within buckets of a
locality-sensitive hash (Indyk and Motwani 1998).
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from typing import Any

import numpy as np

from mlxtune.data.rows.formats import Record
from mlxtune.splitmix import GOLDEN, scrambled

HASHES = 32
BAND = 4  # hashes that must all agree for two rows to be compared: 8 bands catch 98% of pairs at similarity 0.8
SIMILAR = 0.8  # share of shingles in common from which two rows count as near duplicates
_WORD = re.compile(r"\w+")
_draw = np.random.default_rng(0)
_FACTORS = _draw.integers(1, 2**61, HASHES, np.uint64) | np.uint64(1)
_WEIGHTS = _draw.integers(1, 2**61, 3, np.uint64) | np.uint64(1)
_SHIFTS = _draw.integers(0, 2**61, HASHES, np.uint64)


def content_hash(record: Record) -> int:
    """64 bits: equal for rows with equal content."""
    content = [record.messages, record.tools, record.text]
    return hash_of(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str))


def hash_of(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def words_of(record: Record) -> list[str]:
    """What a row says: not the system prompt, which many rows share, but tool calls and thinking too."""
    texts = [record.text or ""]
    for message in record.messages or []:
        if message["role"] not in ("system", "developer"):
            texts += [str(value) for key, value in message.items() if key not in ("role", "instruction", "input")]
    return _WORD.findall(" ".join(texts).lower())


def signature(words: list[str]) -> np.ndarray:
    """[HASHES] uint32: the share of equal entries in two signatures estimates the share of common shingles."""
    known = np.fromiter((zlib.crc32(word.encode()) for word in words or [""]), np.uint64)
    with np.errstate(over="ignore"):
        if len(known) > 2:
            known = (known[:-2] * _WEIGHTS[0] + known[1:-1] * _WEIGHTS[1] + known[2:] * _WEIGHTS[2]) >> np.uint64(20)
        mixed = known[:, None] * _FACTORS + _SHIFTS
    return (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)


def near(signatures: np.ndarray) -> np.ndarray:
    """[N] the first row that each row is a near duplicate of; itself where there is none. signatures: [N, HASHES]."""
    count = len(signatures)
    first = np.arange(count)
    for start in range(0, HASHES, BAND):
        band = np.ascontiguousarray(signatures[:, start : start + BAND]).view(np.dtype((np.void, 4 * BAND))).ravel()
        _, leader, group = np.unique(band, return_index=True, return_inverse=True)
        other = leader[group]
        for chunk in range(0, count, 1 << 16):
            part = slice(chunk, chunk + (1 << 16))
            alike = (signatures[part] == signatures[other[part]]).mean(axis=1) >= SIMILAR
            first[part] = np.where(alike, np.minimum(first[part], other[part]), first[part])
    while (first != first[first]).any():
        first = first[first]
    return first


def seeded(hashes: Any, seed: int) -> np.ndarray:
    """[N] uint64: a permutation of the hashes that the seed chooses; equal rows stay equal."""
    return scrambled(np.asarray(hashes, np.uint64) ^ np.uint64((seed + 1) * GOLDEN & 0xFFFFFFFFFFFFFFFF))


def threshold(hashes: np.ndarray, fraction: float, seed: int) -> int | None:
    """The seeded hash up to which rows are held out: a share `fraction` of the distinct rows, at least one and not all.
    Equal rows stay on one side. None when there are fewer than two distinct rows.
    """
    distinct = np.unique(seeded(hashes, seed))
    count = min(max(1, round(len(distinct) * fraction)), len(distinct) - 1)
    return int(distinct[count - 1]) if count else None
