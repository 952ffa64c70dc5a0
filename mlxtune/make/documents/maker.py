"""The maker `from-documents`: chunks -> requests -> pairs -> rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxtune.evaluate.checks.words import words_of
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make.documents.absent import Kept, answer_for, drawn
from mlxtune.make.documents.asking import Pair, parsed, prompt
from mlxtune.make.documents.chunks import Chunk
from mlxtune.make.documents.grounding import fault_of, unfounded
from mlxtune.make.folder import Failed, Making, Rejected, Row, Spent, Yield
from mlxtune.make.guard import Guard
from mlxtune.make.pool import Pool
from mlxtune.make.portions import asked_about, portions

PORTION = 32  # chunks that are asked about before the answers are looked at, at most
NEAR = 0.7  # ROUGE-L of two questions above which the second does not stay
POOR = 0.05  # share of what was asked for that is kept, below which a portion is a poor one
LAST = 3 * PORTION  # chunks of poor portions in a row, after which no more are asked about
WITH_TEXT = "{chunk}\n\n{question}"  # the prompt of a row that is to be answered from a text


@dataclass(frozen=True)
class Wanted:
    """What is to be made."""

    # Questions to ask for, of each chunk.
    per_chunk: int
    # Rows; None: as many as the chunks give.
    count: int | None = None
    # Share of the rows whose question the text does not answer.
    unanswerable: float = 0.0
    # Whether only what the engine does not know without the text stays.
    closed: bool = False
    # Whether the text is in the prompt, before the question.
    with_text: bool = False
    # Of what is drawn by chance.
    seed: int = 0

    @property
    def answerable(self) -> int | None:
        """How many questions are to be answered; None for any number."""
        return None if self.count is None else self.count - round(self.unanswerable * self.count)


class FromDocuments:
    """One making out of chunks."""

    def __init__(self, making: Making, chunks: Sequence[Chunk], guard: Guard, wanted: Wanted) -> None:
        self.making = making
        self.chunks = chunks
        making.guard = guard
        self.wanted = wanted
        self.kept: list[Kept] = []
        self._pool = Pool()

    def run(self) -> tuple[Yield, str]:
        """(What came of it, why it stopped before its end, "" where it did not)."""
        stopped = ""
        try:
            stopped = self._all()
        except Spent as spent:
            stopped = str(spent)
        self._keep_unanswerable()
        expected = len(self.chunks) * self.wanted.per_chunk if self.wanted.count is None else self.wanted.count
        return Yield("rows", expected), stopped

    def _all(self) -> str:
        poor = 0  # chunks of portions in a row of which hardly anything stayed
        for portion in portions(self.chunks, PORTION):
            if self._is_enough():
                return ""
            before = len(self.kept)
            self._portion(portion)
            wanted = len(portion) * self.wanted.per_chunk
            poor = poor + len(portion) if len(self.kept) - before < POOR * wanted else 0
            if poor >= LAST:
                return f"of the last {poor} chunks hardly anything can be kept: see rejected.jsonl"
        return ""

    def _is_enough(self) -> bool:
        return self.wanted.answerable is not None and len(self.kept) >= self.wanted.answerable

    def _portion(self, portion: Sequence[Chunk]) -> None:
        """Ask about some chunks, and keep what is good of the answers."""
        answers = self.making.ask(first_requests(portion, self.wanted.per_chunk))
        found: list[Kept] = []
        for chunk, answer in zip(portion, answers, strict=True):
            if not isinstance(answer, Failed):
                found += [Kept(pair, chunk) for pair in self._pairs(chunk, answer)]
        for one in self._unknown(found) if self.wanted.closed else found:
            if self._is_enough():
                return
            if self._is_new(one):
                self._keep(one)

    def _pairs(self, chunk: Chunk, answer: Answer) -> list[Pair]:
        """Those of an answer that its chunk shows."""
        pairs, bad = parsed(answer.text, answer.finish == "length")
        for reason, text in bad:
            self.making.reject(Rejected({"text": text, "chunk": chunk.id}, reason))
        good = []
        for number, pair in enumerate(pairs, 1):
            if number > self.wanted.per_chunk:
                self._reject(Kept(pair, chunk), "too many")
            elif fault := fault_of(pair, chunk.text):
                self._reject(Kept(pair, chunk), fault.reason, fault.detail)
            else:
                good.append(pair)
        return good

    def _unknown(self, found: Sequence[Kept]) -> list[Kept]:
        """Those that the engine does not answer by itself."""
        if not found:
            return []
        requests = []
        for number, one in enumerate(found):
            id = f"closed:{one.chunk.id}:{number}"
            requests.append(Request(id, [{"role": "user", "content": one.pair.question}]))
        unknown = []
        for one, answer in zip(found, self.making.ask(requests), strict=True):
            if isinstance(answer, Answer) and says(answer.text, one.pair):
                self._reject(one, "known", answer.text)
            else:
                unknown.append(one)
        return unknown

    def _is_new(self, one: Kept) -> bool:
        """Whether nothing kept asks the same."""
        score, _ = self._pool.nearest(one.pair.question)
        if score > NEAR:
            self._reject(one, "near duplicate", f"ROUGE-L {score:.2f}")
            return False
        return True

    def _keep(self, one: Kept) -> None:
        messages = self._conversation(one.chunk, one.pair.question, one.pair.answer)
        if self.making.keep(Row(messages, {**self.making.made([one.chunk.id]), "quote": one.pair.quote})):
            self._pool.add(one.pair.question)
            self.kept.append(one)

    def _keep_unanswerable(self) -> None:
        share = self.wanted.unanswerable
        count = round(len(self.kept) * share / (1 - share)) if share else 0
        for one, chunk in drawn(self.kept, self.chunks, count, self.wanted.seed):
            messages = self._conversation(chunk, one.pair.question, answer_for(one))
            made = self.making.made([chunk.id, one.chunk.id])
            self.making.keep(Row(messages, {**made, "quote": "", "unanswerable": True}))

    def notes(self) -> list[str]:
        """Of questions that could not be asked beside a text that does not answer them."""
        mute = sum(not answer_for(one) for one in self.kept) if self.wanted.unanswerable else 0
        if not mute:
            return []
        return [f"--unanswerable: {mute:,} questions are in a language in which there is no sentence for that"]

    def _conversation(self, chunk: Chunk, question: str, answer: str) -> list[dict[str, str]]:
        asked = question
        if self.wanted.with_text:
            asked = WITH_TEXT.format(chunk=chunk.text, question=question)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    def _reject(self, one: Kept, reason: str, detail: str = "") -> None:
        pair = one.pair
        row = {"question": pair.question, "answer": pair.answer, "quote": pair.quote, "chunk": one.chunk.id}
        self.making.reject(Rejected(row, reason, detail))


def first_requests(chunks: Sequence[Chunk], per_chunk: int) -> list[Request]:
    """How some chunks are asked about."""
    return [Request(chunk.id, prompt(chunk.text, per_chunk)) for chunk in chunks]


def expected_requests(chunks: Sequence[Chunk], wanted: Wanted) -> int:
    """How many requests there are at most, where all that is asked for can be kept."""
    asked = len(chunks)
    if wanted.answerable is not None:
        asked = asked_about(-(-wanted.answerable // wanted.per_chunk), chunks, PORTION)
    return asked * (1 + wanted.per_chunk) if wanted.closed else asked


def says(text: str, pair: Pair) -> bool:
    """Whether an answer that was given without the chunk says what the pair's does: it has all of its numbers and
    names, and more than half of its words beyond those of the question.
    """
    if unfounded(pair.question, pair.answer, text) is not None:
        return False
    asked = set(words_of(pair.question))
    own = [word for word in words_of(pair.answer) if word not in asked]
    said = set(words_of(text))
    return sum(word in said for word in own) * 2 > len(own)
