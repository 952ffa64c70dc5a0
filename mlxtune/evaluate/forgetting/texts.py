"""General texts as tokens: the base's own answers to shipped prompts, or a file of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad, whole_text
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.evaluate.checks.shipped import GENERAL
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.checks.words import without_thought
from mlxtune.evaluate.engines.local import Local
from mlxtune.evaluate.engines.request import Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.kept import Kept
from mlxtune.model.load import Loaded

ANSWER_TOKENS = 64  # of the base's answer to a general prompt: what begins otherwise shows early
MOST_TOKENS = 512  # of a text: logits of a long one would fill the memory
MOST_TEXTS = 512  # of a file: more narrow the interval little


@dataclass(frozen=True)
class Text:
    """Tokens, of which those from a place on are predicted from what stands before."""

    ids: list[int]  # at least one more than `first`
    first: int  # the place of the first token that counts; 1 at least


def own_answers(
    loaded: Loaded, template: tuple[dict[str, Any], str], adapter: Path, done: Kept
) -> tuple[list[Text], list[str]]:
    """(The base's greedy answers to the general prompts, what must be known of how they came). loaded: with the adapter
    on it; template: as `Local` takes it; done: the batches that were answered before. One that was not whole is
    answered again whole: in 16 bits an answer depends on what is answered beside it.
    """
    base = Local(loaded, Sampling(ANSWER_TOKENS), template, adapter, is_base=True)
    requests = [Request(row.id, row.messages) for row in read_suite(GENERAL).rows]
    prepared = False
    if "plan" not in done:
        done.keep({"plan": {"batches": base.plan(requests), "notes": base.notes}})
        prepared = True
    texts = []
    for number, places in enumerate(done["plan"]["batches"]):
        name = f"batch {number}"
        if name not in done:
            if not prepared:
                base.plan(requests)
                prepared = True
            batch = [requests[place] for place in places]
            done.keep({name: [[[*prompt, *answer], len(prompt)] for prompt, answer in base.tokens_of(batch)]})
        texts += [Text(ids, first) for ids, first in done[name]]
    return texts, done["plan"]["notes"]


def texts_of(file: Path, loaded: Loaded, template: tuple[dict[str, Any], str]) -> tuple[list[Text], list[str]]:
    """(The texts of a file, what must be said of them): the lines of a .txt file, or rows as training reads them, of
    whose conversations the last answer counts. Raises UserError for a file without any, or with rows that are none.
    """
    found: list[Text] = []
    short = cut = 0
    for ids, first in _tokenized(file, loaded, template):
        if len(ids) <= first:
            short += 1
            continue
        cut += len(ids) > MOST_TOKENS
        if first < MOST_TOKENS:
            found.append(Text(ids[:MOST_TOKENS], first))
    if not found:
        raise UserError(
            f"{file} has no text of two tokens and more", "One text a line (.txt), or rows as for training."
        )
    notes = []
    if short:
        notes.append(f"{file}: {short} texts are too short, and left out")
    if cut:
        notes.append(f"{file}: {cut} texts are longer than {MOST_TOKENS} tokens: the rest of them is left out")
    if len(found) > MOST_TEXTS:
        notes.append(f"{file}: {MOST_TEXTS} of {len(found)} texts are taken, evenly over the file")
        found = [found[place * len(found) // MOST_TEXTS] for place in range(MOST_TEXTS)]
    loaded.check_ids([text.ids for text in found])
    return found, notes


def _tokenized(file: Path, loaded: Loaded, template: tuple[dict[str, Any], str]) -> Iterator[tuple[list[int], int]]:
    """(A text's tokens, how many of them come before what counts)."""
    if file.suffix == ".txt":
        for line in whole_text(file, "--forgetting").splitlines():
            if line.strip():
                yield list(loaded.tokenizer(line)["input_ids"]), 1
        return
    bad: list[Bad] = []
    total = 0
    for record in formats.without_pairs(formats.read(file)):
        total += 1
        if isinstance(record, Bad):
            bad.append(record)
        elif record.text is not None:
            yield list(loaded.tokenizer(record.text)["input_ids"]), 1
        else:
            yield _conversation(record, loaded, template)
    formats.require_good(bad, total)


def _conversation(record: Record, loaded: Loaded, template: tuple[dict[str, Any], str]) -> tuple[list[int], int]:
    """Raises UserError for one that does not end with an answer, or that the template refuses."""
    messages = record.messages or []
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise UserError(
            f"{record.file} {record.place}: it does not end with an answer", "Such a row gives no text to predict."
        )
    try:
        prompt = generate.prompt_ids(loaded, messages[:-1], *template, record.tools)
    except UserError as error:
        raise UserError(f"{record.file} {record.place}: {error.message}", error.hint) from error
    answer = without_thought(str(messages[-1].get("content") or ""))
    return [*prompt, *loaded.tokenizer(answer, add_special_tokens=False)["input_ids"]], len(prompt)
