"""Who makes the rows: an engine by its spelling, what decides its answers, and its licence.

As `evaluate.engines.opening` tells them apart: a model, a server, or answers that were recorded. One is read, or
asked, only when something is left to answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from mlxtune_convert.files import digest
from mlxtune_convert.hf import chat_templates

from mlxtune.config.resolve import Config
from mlxtune.data.template.tokenizer import require_folder
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.opening import Kind, kind_of, replayed
from mlxtune.evaluate.engines.replay import Replay
from mlxtune.evaluate.engines.request import Answer, Engine, Request, Unaskable, Wrapper
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.engines.server import Server


@dataclass(frozen=True)
class Opened:
    """An engine that can be called for. Calling it gives the engine, which is read then."""

    # As the command line spells it.
    spelled: str
    # "model", "server" or "replay".
    kind: Kind
    # What rows call it: no place on this machine's disk.
    name: str
    # What decides its answers; JSON.
    identity: dict[str, Any]
    # As its own card says; "" where that is not known.
    licence: str
    # Whether it is asked by turns of a conversation; False: it goes on with a text, as a base model does.
    chats: bool
    # Reads it.
    read: Callable[[], Engine]

    def __call__(self) -> Engine:
        return Patient(self.read())


def opened(
    spelled: str,
    sampling: Sampling,
    allow_remote: bool = False,
    ends: Sequence[str] = (),
    as_text: bool = False,
    begun_on: str = "",
) -> Opened:
    """An engine by its spelling. Raises UserError for what is none, or would send prompts to another machine.

    ends: texts that end an answer of a base model, which goes on with the one message of each request and seldom ends
    by itself; (): a base model is given all messages as plain text, and goes on until --max-tokens. as_text: a model
    with a chat template is asked as a base model is. begun_on: the day (ISO) that a making goes on with, for templates
    that print the day: tomorrow's prompts are then today's; "": today.
    """
    how = {"sampling": asdict(sampling)}
    kind = kind_of(spelled)
    if kind == "server":
        if as_text:
            raise UserError("--completion needs a model here: a server is asked by turns", "Leave it out.")
        server = Server(spelled, sampling, allow_remote)
        return Opened(spelled, kind, server.name, {"server": server.name, **how}, "", True, lambda: server)
    if kind == "replay":
        file, side = replayed(spelled)
        replay = Replay(file, side, in_parts=True)
        identity = {"replay": digest(file), **({} if side is None else {"side": side})}
        return Opened(spelled, kind, f"replay:{file.name}", identity, "", not as_text, lambda: replay)
    return _model(spelled, sampling, how, ends, as_text, begun_on)


def _model(
    spelled: str, sampling: Sampling, how: dict[str, Any], ends: Sequence[str], as_text: bool, begun_on: str
) -> Opened:
    from mlxtune.model.hub import resolve
    from mlxtune.ship.card import licence_of
    from mlxtune.train.identity import of_answering

    folder = resolve(spelled)
    require_folder(folder)
    templates = chat_templates.of_folder(folder)
    chats = bool(templates) and not as_text
    prints_day = chats and any("strftime_now" in text for text in templates.values())
    day = (begun_on or date.today().isoformat()) if prints_day else ""
    template = (dict(Config().data.template_kwargs), day)

    def read() -> Engine:
        from mlxtune.evaluate.benchmarks.continuing import Continuing
        from mlxtune.evaluate.engines.local import Local
        from mlxtune.model import load

        loaded = load.load(spelled)
        if ends and not chats:
            return Continuing(loaded, sampling, ends)
        return Local(loaded, sampling, template)

    name = folder.resolve().name if Path(spelled).expanduser().exists() else spelled
    identity = {"model": of_answering(folder), **({"day": day} if day else {}), **how}
    return Opened(spelled, "model", name, identity, licence_of(folder), chats, read)


class Patient(Wrapper):
    """An engine of which each request that cannot be planned fails alone, when its turn comes."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._refused: dict[tuple[str, int], Unaskable] = {}  # of the last plan, by (id, sample)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """As the engine plans them; those that it refuses, each alone, behind the others."""
        self._refused = {}
        try:
            return self.engine.plan(requests)
        except UserError:
            good = [place for place, request in enumerate(requests) if self._can_be_planned(request)]
            refused = [place for place in range(len(requests)) if place not in good]
            planned = self.engine.plan([requests[place] for place in good]) if good else []
            return [*([good[one] for one in batch] for batch in planned), *([place] for place in refused)]

    def _can_be_planned(self, request: Request) -> bool:
        try:
            self.engine.plan([request])
        except UserError as error:
            self._refused[request.id, request.sample] = Unaskable(error.message, error.hint)
            return False
        return True

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        for request in requests:
            if (request.id, request.sample) in self._refused:
                raise self._refused[request.id, request.sample]
        return self.engine.answers(requests)
