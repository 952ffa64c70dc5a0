"""A conversation in the terminal: what is asked, and how an answer is said as it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import shown

from mlxtune.api import tuned
from mlxtune.cli import common

if TYPE_CHECKING:
    from mlxtune.data.template.answers import Plain, Reader, Said
    from mlxtune.evaluate.chats.log import ChatLog
    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.model.load import Loaded


class Voice:
    """Says an answer as it comes: the answer on standard output, the thought before it dim on standard error."""

    def __init__(self, reader: Reader | Plain, raw: bool = False) -> None:
        """raw: control characters that the model says are not made visible."""
        self.reader = reader
        self.spelled: Callable[[str], str] = str if raw else shown
        self.text = ""  # what the model said so far: thought, marks and answer
        self.thought = 0  # characters of the thought that were printed
        self.content = 0  # characters of the answer that were printed

    def hear(self, piece: str) -> None:
        """Take the next piece of text, and print what is certain by now: an end of a mark may still be to come."""
        self.text += piece
        self._say(self.reader.so_far(self.text))

    def end(self, remark: str) -> None:
        """Say what was held back, and end the line, with a remark that is no part of the answer."""
        self._say(self.reader.said(self.text))
        click.echo(remark, nl=False, err=True)
        if self.thought and not self.content:
            click.echo(err=True)
        click.echo()

    def _say(self, said: Said) -> None:
        """Print what was not printed yet. A thought after the answer has begun is not shown."""
        if not self.content and len(said.thought) > self.thought:
            click.secho(shown(said.thought[self.thought :]), nl=False, err=True, dim=True)
            self.thought = len(said.thought)
        if said.content and not self.content and self.thought:
            click.echo("\n", err=True)
        click.echo(self.spelled(said.content[self.content :]), nl=False)
        self.content = max(self.content, len(said.content))


class Talk:
    """A conversation with a model, by the chat template, and the variables and day, that it was tuned with."""

    def __init__(self, loaded: Loaded, adapter: Path | None, sampling: Sampling, raw: bool = False) -> None:
        from mlxtune_convert.hf.chat_templates import unread

        for note in unread(loaded.path):
            common.note(note)
        data = tuned.run_settings(adapter, None).data
        self.loaded = loaded
        self.sampling = sampling
        self.raw = raw
        self.settings = dict(data.template_kwargs), data.date  # what the template is given beside the messages
        self.log: ChatLog | None = None  # where answers are kept; None: nowhere
        self.system: str | None = None
        self.history: list[dict[str, Any]] = []  # messages without the system prompt

    def instruct(self, system: str | None) -> None:
        """Begin anew with a system prompt. Raises UserError, and changes nothing, when the template refuses it."""
        from mlxtune.evaluate.generate import prompt_ids

        if system:
            tried = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
            prompt_ids(self.loaded, tried, *self.settings)
        self.system = system
        self.history = []
        if self.log is not None:
            self.log.begin()

    def ask(self, text: str) -> bool:
        """Have a message answered; False when Ctrl-C ended the answer: what was said so far is kept.

        Raises UserError when the template refuses the message, and whatever MLX raises; the message is not kept then.
        """
        from mlxtune.evaluate.generate import prompt_ids, reader_for

        question = {"role": "user", "content": text}
        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*head, *self.history, question]
        ids = prompt_ids(self.loaded, messages, *self.settings)
        voice = Voice(reader_for(self.loaded, messages, *self.settings), self.raw)
        whole = self._listen(voice, ids)
        if whole and voice.thought and not voice.content:
            limit = "" if voice.reader.ended(voice.text) else f" within --max-tokens {self.sampling.max_tokens}"
            common.note(f"the model thought, and gave no answer{limit}")
        answer = voice.reader.message(voice.text)
        if voice.reader.takes(answer):
            self.history += [question, answer]
            if self.log is not None:
                self.log.add(messages, answer, whole)
        else:
            common.note("the chat template does not take this answer back: question and answer are not kept")
        return whole

    def _listen(self, voice: Voice, ids: list[int]) -> bool:
        """Have `voice` say the answer to a prompt; False when Ctrl-C ended it. Raises whatever MLX raises."""
        from mlxtune.evaluate.generate import stream

        try:
            for piece in stream(self.loaded, ids, self.sampling):
                voice.hear(piece)
        except KeyboardInterrupt:
            voice.end(" [stopped]")
            return False
        except (RuntimeError, MemoryError):
            if voice.text:
                voice.end("")  # the error is said on a line of its own
            raise
        voice.end("")
        return True
