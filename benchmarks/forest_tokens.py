"""Tokens that a planned epoch computes, against each conversation rendered once.

    python benchmarks/forest_tokens.py TOKENIZER FILE...

TOKENIZER: a folder with a tokenizer and its chat template; FILE: a data file. `data.max_tokens=16384`, rows that the
template damages kept, everything else as by default. Of each file, in tokens of all conversations rendered once:

    computed    positions that go through the model in the first epoch, padding included
    trie        of a trie of each conversation's examples: what sharing within conversations alone could reach
    alone       what is computed where every turn is an example of its own and none is shared

and the share of the examples that is computed, with the default examples and with one for each turn.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxtune.compute import counted, prefix
from mlxtune.config.schema import DataSection, TrainSection
from mlxtune.data.dataset import mixture
from mlxtune.data.dataset.batches import Plan
from mlxtune.data.dataset.beginnings import common
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.sharing import found_sharing
from mlxtune.data.template.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Counted:
    """What one way to make examples of a file costs."""

    tokens: int  # of the examples
    computed: int  # positions, where what examples share is computed once
    trie: int  # of a trie for each row
    once: int  # tokens of the rows, each rendered once


def count(tokenizer: object, file: Path, expand_turns: str) -> Counted:
    """Plan an epoch of all rows of a file, and count."""
    section = DataSection(
        path=str(file), max_tokens=16384, on_damage="keep", expand_turns=expand_turns, cache="off", valid_fraction=0.1
    )
    examples = mixture.read(section, tokenizer, 0, whole=True)["train"]
    plan = Plan(examples, TrainSection(epochs=1), found_sharing(examples))
    epoch = counted.first_epoch(plan, prefix.shared_by_run(examples))
    assert epoch.exact and epoch.tokens == int(examples.lengths.sum())
    return Counted(epoch.tokens, epoch.computed, tries(examples), int(examples.of_rows("once").sum()))


def tries(examples: Examples) -> int:
    """Tokens of a trie for each row: in lexical order, an example adds what the one before does not begin with."""
    by_row: dict[int, list[list[int]]] = {}
    for index, row in enumerate(examples.row_of.tolist()):
        by_row.setdefault(row, []).append(np.asarray(examples[index].ids).tolist())
    return sum(_trie(rows) for rows in by_row.values())


def _trie(rows: Sequence[list[int]]) -> int:
    tokens, before = 0, list[int]()
    for row in sorted(rows):
        tokens += len(row) - common(before, row)
        before = row
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokenizer = load_tokenizer(asked.tokenizer)
    print("| file | computed | trie | alone | share of the examples | share of one example a turn |")
    print("|---|---|---|---|---|---|")
    for file in asked.files:
        usual, every = count(tokenizer, file, "auto"), count(tokenizer, file, "all")
        once = usual.once
        print(
            f"| {file.name} | {usual.computed / once:.2f} | {usual.trie / once:.2f} | {every.tokens / once:.2f} | "
            f"{usual.computed / usual.tokens:.2f} | {usual.computed / every.tokens:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
