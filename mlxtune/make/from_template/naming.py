"""Values of a slot that an engine names: it is asked for lists, until there are enough or nothing new comes."""

from __future__ import annotations

from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make import parsing
from mlxtune.make.folder import Making
from mlxtune.make.from_template.description import Named

AT_ONCE = 25  # values that are asked for at a time: of longer lists the end repeats
PATIENCE = 3  # lists in a row without anything new, after which no more are asked for
SHOWN = 40  # values that the engine is told not to name again
LONGEST = 200  # characters of a value


def request(slot: str, wanted: Named, known: list[str], ask: int) -> Request:
    """known: the values so far; ask: how many lists were asked for before."""
    missing = min(AT_ONCE, wanted.count - len(known))
    text = f"Name {missing} different values of: {wanted.what}.\n\nReply with a numbered list alone, one value a line."
    if known:
        text += f" None of these: {', '.join(known[-SHOWN:])}."
    return Request(f"slot:{slot}", [{"role": "user", "content": text}], sample=ask)


def items(answer: Answer) -> list[str]:
    """The values of a list; the last one may be cut where the answer is."""
    found = [item.strip("*_\"'`").rstrip(".;,") for item in parsing.listed_lines(answer.text)]
    if answer.finish == "length":
        found = found[:-1]
    return [item for item in found if item and len(item) <= LONGEST]


def values(making: Making, slot: str, wanted: Named) -> list[str]:
    """As many as are wanted; fewer where the engine names no new ones. Raises Spent as `Making.ask` does."""
    known: list[str] = []
    folded: set[str] = set()
    ask = idle = 0
    while len(known) < wanted.count and idle < PATIENCE:
        (answer,) = making.ask([request(slot, wanted, known, ask)])
        ask += 1
        before = len(known)
        for item in items(answer) if isinstance(answer, Answer) else []:
            if item.casefold() not in folded and len(known) < wanted.count:
                folded.add(item.casefold())
                known.append(item)
        idle = idle + 1 if len(known) == before else 0
    return known
