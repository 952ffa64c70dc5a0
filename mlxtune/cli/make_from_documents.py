"""mlxtune make from-documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import common
from mlxtune.cli.make import Wanted, dry_run, making, making_options, say
from mlxtune.cli.options import Command, Need, OptionFor
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.make.documents.chunks import Chunk
    from mlxtune.make.engine import Opened

HOW = "from-documents"
WITH_TEXT = Need(
    "with_text",
    why="a question that the text does not answer needs the text beside it",
    hint="Add --with-text.",
)


@click.command(HOW, cls=Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--per-chunk", type=click.IntRange(1, 20), default=3, show_default=True, help="Questions of each chunk.")
@click.option(
    "--chunk-tokens", type=click.IntRange(min=50), default=600, show_default=True, help="Size of a chunk, about."
)
@click.option("--with-text", is_flag=True, help="The prompt of a row holds the chunk, before the question.")
@click.option(
    "--unanswerable",
    type=click.FloatRange(0, 0.5),
    default=0.0,
    metavar="SHARE",
    cls=OptionFor,
    needs=WITH_TEXT,
    help="Share of rows whose question the text does not answer, which they say.",
)
@click.option("--closed", is_flag=True, help="Keep only what the engine does not know without the text.")
@making_options(count=None, max_tokens=1024, temperature=0.7)
def from_documents(
    paths: tuple[Path, ...],
    per_chunk: int,
    chunk_tokens: int,
    with_text: bool,
    unanswerable: float,
    closed: bool,
    **given: Any,
) -> None:
    """Make questions and answers out of documents.

    PATH: files (.md, .txt, .html, .csv, .tsv; .pdf and .docx with the extra `documents`), or folders of them. The
    engine gives each answer with a quote. A row stays only where the quote is in the document, and with it every number
    and name of the answer.

    \b
    mlxtune make from-documents handbook --engine model --out made
    mlxtune make from-documents guide.md faq.html --engine model --with-text --unanswerable 0.1 --out made
    """
    from mlxtune.make.documents import maker

    wanted = Wanted.of(given)
    engine = wanted.opened()
    if not engine.chats:
        raise UserError(
            f"{engine.name} has no chat template: it goes on with texts, and answers no requests", "Take a chat model."
        )
    guard = wanted.guard()
    chunks = _chunks(paths, engine, chunk_tokens)
    asked = maker.Wanted(per_chunk, wanted.count, unanswerable, closed, with_text, wanted.seed)
    if wanted.dry_run:
        first = maker.first_requests(chunks[: maker.PORTION], per_chunk)
        dry_run(wanted, engine, first, maker.expected_requests(chunks, asked))
        return
    identity = wanted.identity(
        HOW,
        chunks=_digest(chunks),
        per_chunk=per_chunk,
        unanswerable=unanswerable,
        closed=closed,
        with_text=with_text,
    )
    with making(wanted, engine, identity) as one:
        work = maker.FromDocuments(one, chunks, guard, asked)
        document = one.finish(*work.run())
        document["notes"] += work.notes()
        say(document, one.found, wanted.as_json)


def _chunks(paths: tuple[Path, ...], engine: Opened, size: int) -> list[Chunk]:
    """Of all documents. What must be said of them is said."""
    from mlxtune.make.documents import chunks as cutting
    from mlxtune.make.documents import reading

    found, notes = reading.find(paths)
    for note in notes:
        common.note(note)
    count = _counting(engine)
    if count is cutting.estimated:
        common.note(f"chunks are measured by their words, which is an estimate: {engine.name} shows no tokenizer")
    chunks: list[Chunk] = []
    for name, file in found:
        chunks += cutting.chunks(reading.read(name, file), count, size, min(cutting.OVERLAP, size // 10))
    return chunks


def _counting(engine: Opened) -> Callable[[str], int]:
    """Who counts tokens: the engine's own tokenizer where it is a model on this machine."""
    from mlxtune.make.documents.chunks import estimated

    if engine.kind != "model":
        return estimated
    from mlxtune.data.template.tokenizer import load_tokenizer
    from mlxtune.model.hub import resolve

    tokenizer = load_tokenizer(resolve(engine.spelled))
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _digest(chunks: list[Chunk]) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps([[chunk.id, chunk.text] for chunk in chunks]).encode()).hexdigest()
