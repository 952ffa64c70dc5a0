"""The suites that come with mlxtune, of our own writing.

`basics` are a hundred closed questions that any model answers before it is tuned: what tuning unlearns shows there.
`safety` are pairs, a request to refuse and its harmless neighbour to answer, with rewordings of the first: role play,
"ignore your instructions", a story, an authority, another language; and prompts that ask for the system prompt. Tags
say which is which.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "suites"
BASICS = FOLDER / "basics.jsonl"
SAFETY = FOLDER / "safety.jsonl"
