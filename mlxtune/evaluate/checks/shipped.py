"""The suites that come with mlxtune, of our own writing.

`basics` are a hundred closed questions that any model answers before it is tuned: what tuning unlearns shows there.
`safety` are pairs, a request to refuse and its harmless neighbour to answer, with rewordings of the first: role play,
"ignore your instructions", a story, an authority, another language; and prompts that ask for the system prompt. Tags
say which is which. `general` are prompts without checks, whose answers show how far a tuned model drifts from its base.
"""

from __future__ import annotations

from pathlib import Path

from mlxtune.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "suites"
BASICS = FOLDER / "basics.jsonl"
SAFETY = FOLDER / "safety.jsonl"
GENERAL = FOLDER / "general.jsonl"
NAMES = {"basics": BASICS, "safety": SAFETY}  # by which they can be asked for, in place of a file


def suite_file(named: Path) -> Path:
    """The file of a suite: a path, or the name of one that comes with mlxtune, unless a file of that name is here.
    Raises UserError for neither.
    """
    if named.is_file():
        return named
    if str(named) in NAMES:
        return NAMES[str(named)]
    raise UserError(f"no data file {named}", f"A file of prompts, or a suite of mlxtune's own: {', '.join(NAMES)}.")
