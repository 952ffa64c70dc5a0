"""Answers of a model in this process, several prompts at once where that is proven."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune_convert.hf.chat_templates import unread

from mlxtune.adapter.attach import switched_off
from mlxtune.data.template.answers import Plain, Reader
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.evaluate.engines import applied, beginning, proof, room
from mlxtune.evaluate.engines.beginning import Beginning
from mlxtune.evaluate.engines.decode import Counted, decode
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Chooser, Sampling, row_key
from mlxtune.model.corrections.extent import longest_alike
from mlxtune.model.load import Loaded


@dataclass(frozen=True)
class Asked:
    """A request as the model sees it."""

    ids: list[int]  # of the prompt
    reader: Reader | Plain  # of the answer


class Local:
    """A loaded model as an engine. `plan` must be called before `answers`, with all requests."""

    def __init__(
        self,
        loaded: Loaded,
        sampling: Sampling,
        template: tuple[dict[str, Any], str] = ({}, ""),
        adapter: Path | None = None,
        is_base: bool = False,
        rows_at_once: int | None = None,
    ) -> None:
        """template: the variables and the day that the chat template is given; adapter: the folder of the one that is
        on the model, None for none; is_base: it is switched off meanwhile; rows_at_once: how many prompts at most are
        answered together, None for as many as the memory takes.
        """
        self.loaded = loaded
        self.sampling = sampling
        self.template = template
        self.adapter = None if is_base else adapter
        self.is_base = is_base
        self.name = str(loaded.path) if self.adapter is None else f"{loaded.path} with {adapter}"
        self.notes: list[str] = []
        self.model = Counted(loaded.model)
        self._most = rows_at_once
        self._asked: dict[str, Asked] = {}  # by what is said: prompts under one id need not be the same
        self._beginning: Beginning | None = None  # None: prompts are answered one by one
        self._begin: list[int] = []  # its tokens
        self._proven = 0  # tokens of the longest prompt with which answering together was proven

    def work(self) -> dict[str, int]:
        """Passes of the model, and the tokens that went through it, padding included."""
        return {"passes": self.model.passes, "computed": self.model.tokens}

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Prompts of like lengths together, as many as the memory takes; each alone where it cannot be otherwise."""
        prompts = [self._prompt(request) for request in requests]
        for note in [*self._unprinted(requests), *unread(self.loaded.path)]:
            self._say(note)
        if self.loaded.tokenizer.chat_template is None:
            self._say(f"{self.loaded.path} has no chat template: prompts are given to it as plain text")
        with self._side():
            if self.adapter is not None:
                self._say(applied.note_on(self.loaded, self.adapter, prompts[0]))
            alone = [place for place, prompt in enumerate(prompts) if self._must_be_alone(prompt)]
            together = [place for place in range(len(prompts)) if place not in set(alone)]
            together.sort(key=lambda place: len(prompts[place]))
            rows = self._rows_at_once([prompts[place] for place in together])
        return [*_even_parts(together, rows), *([place] for place in alone)]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        made = self.tokens_of(requests)
        return [self._read(request, tokens) for request, (_, tokens) in zip(requests, made, strict=True)]

    def tokens_of(self, requests: Sequence[Request]) -> list[tuple[list[int], list[int]]]:
        """The same as tokens: (the prompt's, the answer's)."""
        with self._side():
            made = self._together(requests) if self._may_share(requests) else [self._alone(one) for one in requests]
        return [(self._prompt(request), tokens) for request, tokens in zip(requests, made, strict=True)]

    def _as_asked(self, request: Request) -> Asked:
        """Raises UserError naming the prompt where the template refuses it."""
        messages = list(request.messages)
        try:
            ids = generate.prompt_ids(self.loaded, messages, *self.template, request.tools)
        except UserError as error:
            raise UserError(f"prompt {request.id}: {error.message}", error.hint) from error
        return Asked(ids, generate.reader_for(self.loaded, messages, *self.template, request.tools))

    def _unprinted(self, requests: Sequence[Request]) -> list[str]:
        """Notes on what of the prompts' tools the model is not shown."""
        prompts: dict[str, set[str]] = {}  # what is not printed -> of which prompts
        for request in requests:
            for what in generate.unprinted(self.loaded, list(request.messages), *self.template, request.tools):
                prompts.setdefault(what, set()).add(request.id)
        whose = "the chat template" if self.loaded.tokenizer.chat_template is not None else "plain text"
        return [f"{whose} does not show the model {what} of {len(ids)} prompts" for what, ids in prompts.items()]

    def _prompt(self, request: Request) -> list[int]:
        return self._seen(request).ids

    def _seen(self, request: Request) -> Asked:
        """A request as the model sees it, which is worked out once. Raises UserError as `_as_asked` does."""
        said = json.dumps([list(request.messages), request.tools])
        if said not in self._asked:
            self._asked[said] = self._as_asked(request)
        return self._asked[said]

    @contextlib.contextmanager
    def _side(self) -> Iterator[None]:
        """Inside, the model is the one that answers: its base, or with its adapter."""
        with switched_off(self.loaded.model) if self.is_base else contextlib.nullcontext():
            yield

    def _must_be_alone(self, prompt: list[int]) -> bool:
        """A prompt of one token leaves nothing to read in a batch; one whose answer may grow past what a model rotates
        like short rows is computed as it would be alone (`model.corrections.extent`).
        """
        limit = longest_alike(self.loaded.model)
        return len(prompt) < 2 or (limit is not None and len(prompt) + self.sampling.max_tokens > limit)

    def _rows_at_once(self, prompts: list[list[int]]) -> int:
        """How many prompts are answered together. Prepares for it: the proof, and the shared beginning. What was proven
        holds for later plans with prompts that are no longer.

        prompts: the shortest first, those that must be alone aside.
        """
        self._beginning = None  # of an earlier plan: what is answered must not depend on that
        if len(prompts) < 2:
            return 1
        begin = beginning.shared(prompts)
        if len(prompts[-1]) > self._proven:
            why = proof.wrong_together(self.model, [prompts[0], prompts[-1]], begin)
            if why:
                self._say(f"prompts are answered one by one: {why}")
                return 1
            self._proven = len(prompts[-1])
        rows = self._most or room.rows_at_once(self.model, prompts[-1], self.sampling.max_tokens)
        self._beginning, self._begin = Beginning.of(self.model, begin), begin
        return rows

    def _may_share(self, requests: Sequence[Request]) -> bool:
        return self._beginning is not None and not any(self._must_be_alone(self._prompt(one)) for one in requests)

    def _together(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens of each answer, computed at once."""
        assert self._beginning is not None
        prompts = [self._prompt(request) for request in requests]
        chooser = Chooser(self.sampling, [self._key(request) for request in requests], prompts)
        begin = self._beginning
        if any(prompt[: begin.tokens] != self._begin for prompt in prompts):  # of requests that are not of the plan
            begin = Beginning.of(self.model, [])
        ends, most = generate.end_ids(self.loaded), self.sampling.max_tokens
        made: list[list[int]] = [[] for _ in prompts]
        caches = begin.under(len(prompts))

        def is_over(row: int) -> bool:
            return self._is_over(made[row])

        for step in decode(self.model, prompts, chooser, ends, most, caches, begin.tokens, is_over=is_over):
            for row, token in step:
                made[row].append(token)
        return made

    def _alone(self, request: Request) -> list[int]:
        ends = generate.end_ids(self.loaded)
        made: list[int] = []
        prompt, key = self._prompt(request), self._key(request)
        for token in generate.one_by_one(self.model, prompt, key, self.sampling, ends):
            made.append(token)
            if self._is_over(made):
                break
        return made

    def _is_over(self, made: Sequence[int]) -> bool:
        """Whether an answer ends here though its last token is no end token. made: its tokens so far."""
        return False

    def _key(self, request: Request) -> Any:
        return row_key(self.sampling.seed, request.id, request.sample)

    def _read(self, request: Request, tokens: list[int]) -> Answer:
        """An answer's tokens as text, its thought apart."""
        ended = tokens[-1] in generate.end_ids(self.loaded)
        said = self._seen(request).reader.said(generate.decoded(self.loaded, tokens))
        content = said.content
        for token in self.loaded.tokenizer.all_special_tokens:
            content = content.replace(token, "")
        return Answer(request.id, request.sample, content, said.thought, "stop" if ended else "length", len(tokens))

    def _say(self, note: str) -> None:
        if note:
            self.notes.append(note)


def _even_parts(places: list[int], most: int) -> list[list[int]]:
    """Places in parts of `most` at most, none much smaller than another: 33 by 32 gives 17 and 16."""
    count = -(-len(places) // most)
    sizes = [len(places) // count + (part < len(places) % count) for part in range(count)]
    parts, first = [], 0
    for size in sizes:
        parts.append(places[first : first + size])
        first += size
    return parts
