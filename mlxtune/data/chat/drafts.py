"""Asked turns -> the fewest examples that hold them, and the places of the turns among an example's tokens.

A draft is an example before it is cut: the text of its last turn, in which earlier turns stand as they are asked for,
token for token. Which turns can stand in it is known by the texts first, and then by the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxtune.data.chat.asked import AskedTurn
from mlxtune.data.chat.borders import Borders, Tokens


@dataclass
class Draft:
    """An example of T tokens before it is cut: a text and the turns in it, the last of which ends it."""

    turns: list[AskedTurn]  # in the text's order
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [T] the tokens
    places: dict[int, tuple[int, int]] = field(default_factory=dict)  # index of a turn -> its target tokens [from, to)
    tokenized_apart: bool = False  # the last turn is tokenized apart from its prompt

    @property
    def text(self) -> str:
        return self.turns[-1].text + self.turns[-1].trailing

    def holds(self, turn: AskedTurn) -> bool:
        """Whether the turn stands in the text, behind its own prompt."""
        return self.text.startswith(turn.prompt) and self.text.startswith(turn.target, len(turn.prompt))


def drafts_of(turns: Sequence[AskedTurn], each_alone: bool) -> list[Draft]:
    """The fewest examples that hold some turns, as far as their texts show, that of the last turn first.

    each_alone: every turn has an example of its own (data.expand_turns=all).
    """
    drafts: list[Draft] = []
    for turn in sorted(turns, key=lambda turn: turn.index, reverse=True):
        shared = None if each_alone else _latest_that_holds(turn, drafts)
        if shared is None:
            drafts.append(Draft([turn]))
        else:
            shared.turns.insert(0, turn)
    return drafts


def _latest_that_holds(turn: AskedTurn, drafts: list[Draft]) -> Draft | None:
    for draft in reversed(drafts):
        if draft.holds(turn):
            return draft
    return None


def place_last_turns(borders: Borders, drafts: list[Draft]) -> list[Tokens]:
    """Tokenize some drafts and place the last turn of each; return for each the tokens that hold the turns before it.
    Where a token would straddle the end of the last prompt, prompt and target are tokenized apart.
    """
    tokens = borders.tokens([draft.text for draft in drafts])
    straddled: list[int] = []  # numbers of drafts
    for number, draft in enumerate(drafts):
        last = draft.turns[-1]
        start = borders.place(tokens[number], borders.cuts(draft.text), len(last.prompt))
        if start is None:
            straddled.append(number)
        else:
            draft.ids = tokens[number].ids
            draft.places[last.index] = (start, tokens[number].after(len(last.text)))
    prompts = borders.tokens([drafts[number].turns[-1].prompt for number in straddled])
    for number, prompt in zip(straddled, prompts, strict=True):
        _place_apart(borders, drafts[number], prompt)
        tokens[number] = prompt
    return tokens


def _place_apart(borders: Borders, draft: Draft, prompt: Tokens) -> None:
    """Give a draft the tokens of its last prompt, and behind them those of its target by itself."""
    last = draft.turns[-1]
    target = borders.target_by_itself(last.target)
    start = len(prompt.ids)
    draft.ids = np.array([*prompt.ids, *target, *borders.ids(last.trailing)], np.int32)
    draft.places[last.index] = (start, start + len(target))
    draft.tokenized_apart = True


def place_earlier_turns(borders: Borders, draft: Draft, tokens: Tokens) -> None:
    """Find the turns before a draft's last one among its tokens; those that cannot stay are taken out."""
    earlier = draft.turns[:-1]
    if not earlier:
        return
    cuts = borders.cuts(tokens.text)
    for turn in earlier:
        start = borders.place(tokens, cuts, len(turn.prompt))
        if start is not None:
            draft.places[turn.index] = (start, tokens.after(len(turn.text)))
    draft.turns = [turn for turn in draft.turns if turn.index in draft.places]
