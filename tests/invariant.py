"""The oracle of "trained as asked": whether a row's examples train each turn behind the prompt that asks for it.

Everything is worked out anew from `apply_chat_template` of the repaired messages; of the code under test only the
examples are looked at. Texts are told apart by their words (three capitals and a number, as USR0), each of which
belongs to one message alone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from conversations import THOUGHTS, WORD, Messages, thought_of, words
from targets import Run, runs_of

from mlxtune.data.chat import masking, repairs

OPENINGS = {"<think>": "</think>", "<|channel>thought": "<channel|>"}  # what opens a thought: what closes it
SEVERAL = ("<|channel|>", "to=")  # templates of which one turn holds several messages, with headers of their own
NEXT = {"role": "user", "content": "And then?"}


@dataclass
class Options:
    """What a row is rendered with. ends: the tokens that end a turn of the model; stops: those that no render prints
    after the last turn, (after text, after calls), or none.
    """

    ends: tuple[str, ...]
    stops: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    train_on: str = "all"
    shared: bool = True  # whether turns share examples where they can, or none does


def violations(
    tokenizer: Any,
    messages: Messages,
    tools: Any,
    options: Options,
    rows: list[Any],
    counts: Counter[str] | None = None,
) -> list[str]:
    """What is wrong with the examples of a row; one line each. counts: what was seen, by name, is added to it."""
    return _Proof(tokenizer, messages, tools, options, rows, Counter() if counts is None else counts).all()


class _Proof:
    def __init__(
        self, tokenizer: Any, messages: Messages, tools: Any, options: Options, rows: list[Any], counts: Counter[str]
    ) -> None:
        self.tokenizer, self.tools, self.options, self.rows, self.counts = tokenizer, tools, options, rows, counts
        self.messages = repairs.repaired(masking.template_of(tokenizer, options.kwargs), messages)
        self.answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        self.trained = [at for at in self.answers if min(messages[at].get("weight", 1), messages[at].get("train", 1))]
        if options.train_on == "last":
            self.trained = [at for at in self.trained if at == self.answers[-1]]
        self.kinds = {kind for row in rows for kind in getattr(row, "kinds", ())}
        self.damage = {(damage.kind, damage.index) for row in rows for damage in row.damage}
        self.wrong: list[str] = []

    def all(self) -> list[str]:
        refused = [row.dropped for row in self.rows if row.dropped]
        for reason in refused:
            self.counts[f"refused: {re.sub(r'[0-9]+', 'N', reason)[:70]}"] += 1
        for kind in {kind for kind, _ in self.kinds}:
            self.counts[f"exception: {kind}"] += 1
        for kind in {kind for kind, _ in self.damage}:
            self.counts[f"damage: {kind}"] += 1
        runs = [run for row in self.rows if row.example is not None for run in runs_of(row)]
        asked = {at: self.asked(at) for at in self.answers}
        found: dict[int, list[Run]] = {at: [] for at in self.answers}
        other: list[Run] = []
        for run in runs:
            fits = [at for at in self.answers if asked[at] and asked[at][1] == run.ids[: run.start]]
            if len(fits) > 1:  # the template prints nothing of a turn between them
                fits = [at for at in fits if set(words(self.text(run))) & set(words(self.messages[at]))] or fits
            if fits:
                found[fits[0]].append(run)
            else:
                other.append(run)
        for at in self.answers:
            self.turn(at, asked[at], found[at], found, other, bool(refused))
        self.sharing([run for own in found.values() for run in own[:1]])
        for run in other:
            self.say(f"targets {self.text(run)!r} behind {self.decode(run.ids[: run.start])[-60:]!r}, asked by nothing")
        return self.wrong

    def sharing(self, runs: list[Run]) -> None:
        """No turn has an example of its own where a later one's has its prompt and its targets; or each has its own."""
        if not self.options.shared and len({id(run.row) for run in runs}) < len(runs):
            self.say("turns share an example")
        alone = [run for run in runs if not any(run.row.example.mask[run.end :])] if self.options.shared else []
        for run in alone:
            for later in runs:
                if run.end <= later.start and run.row is not later.row and later.ids[: run.end] == run.ids[: run.end]:
                    self.say(f"targets {self.text(run)!r} could share the example of {self.text(later)!r}")

    def turn(
        self, at: int, asked: Any, own: list[Run], found: dict[int, list[Run]], other: list[Run], refused: bool
    ) -> None:
        if at not in self.trained:
            if own:
                self.say(f"turn {at} is trained, and should not be")
            return
        self.counts["turns"] += 1
        if len(own) > 1:
            self.say(f"turn {at} is trained {len(own)} times")
        if own:
            self.counts["turns trained"] += 1
            self.target(at, asked[0], own[0])
        elif asked is None and self.unasked(at, other):
            self.counts["turns unasked"] += 1
        elif self.joins(at) and (found[self.first(at)] or self.asked(self.first(at)) is None):
            self.counts["turns joined"] += 1  # proved with the turn that it is joined to
        elif refused or self.lost(at) or any(("joined, untrained", one) in self.kinds for one in (at, at + 1)):
            self.counts["turns refused"] += 1
            if self.printed(at, asked):
                self.counts["turns refused that the template asks for and prints"] += 1
        else:
            self.say(f"turn {at} has no targets behind {asked[0][-60:] if asked else None!r}")

    def printed(self, at: int, asked: Any) -> bool:
        """Whether the template prints the whole row, asks for the turn, and prints all of it last."""
        last = self.render(self.messages[: at + 1])
        if asked is None or last is None or self.render(self.messages) is None:
            return False
        return set(words(self.messages[at])) <= set(WORD.findall(last))

    def lost(self, at: int) -> bool:
        """Whether damage of the turn leaves nothing to train."""
        return any((kind, at) in self.damage for kind in ("content", "calls", "thinking"))

    def target(self, at: int, asked: str, run: Run) -> None:
        """A turn behind the prompt that asks for it."""
        group = self.group(at)
        canonical = self.render(self.messages[: group[-1] + 1])
        text = self.text(run)
        self.pieces(at, group, text)
        for later in group[1:]:
            asked_later = self.asked(later)
            if canonical is not None and asked_later and canonical.startswith(asked_later[0]):
                self.say(f"turn {later} is called joined, but the template asks for it alone")
        if canonical is None:
            self.counts["turns that cannot be last"] += 1
        elif canonical.startswith(asked):
            self.counts["turns behind their own text"] += 1
            expected, after = self.up_to_end(at, canonical[len(asked) :])
            self.same(at, asked, expected, run)
            self.tail(at, run, after)
        else:
            self.counts["turns printed otherwise"] += 1
            self.apart(at, asked, canonical, text)
            if run.ids[run.start - 1] not in self.tokenizer.added_tokens_decoder:
                follows = self.decode(run.ids[: run.end])[len(self.decode(run.ids[: run.start])) :]
                said = "".join(str(value) for value in self.messages[at].values())
                if follows != text and " " + text[:3] not in canonical + said:
                    self.say(f"turn {at} has a blank before its targets that no text has: {follows!r}")
            self.tail(at, run, self.up_to_end(at, canonical)[1])

    def same(self, at: int, asked: str, expected: str, run: Run) -> None:
        """The targets' text; with the prompt before it, because decoders drop the first blank."""
        whole = self.tokenizer(asked + expected, add_special_tokens=False)["input_ids"]
        if self.decode(run.ids[: run.end]) != self.decode(whole):
            self.say(f"turn {at} has the targets {self.text(run)!r}, not {expected!r}")

    def tail(self, at: int, run: Run, after: str) -> None:
        """What follows the last targets of an example is printed by the template too."""
        if any(run.row.example.mask[run.end :]):
            return
        rest = self.decode(run.ids[run.end :])
        if rest not in ("", after):
            self.say(f"turn {at}, the example's last, is followed by {rest!r}, not {after!r}")

    def up_to_end(self, at: int, rest: str) -> tuple[str, str]:
        """(text up to and with the end token, text after it)."""
        if self.options.stops:
            return rest + self.options.stops[bool(self.messages[at].get("tool_calls"))], ""
        ends = [rest.rfind(token) + len(token) for token in self.options.ends if token in rest]
        end = max(ends, default=len(rest.rstrip()))
        return rest[:end], rest[end:]

    def pieces(self, at: int, group: list[int], text: str) -> None:
        """Each word of the turn stands in its targets once, the thought's before the others; and no other word."""
        own = [word for index in group for word in words(self.messages[index])]
        seen = Counter(WORD.findall(text))
        known = {word for message in self.messages for word in words(message)}
        for word in sorted(seen.keys() & known - set(own)):
            self.say(f"turn {at} trains {word} of another message")
        kinds = {kind for kind, index in self.damage if index in group}
        short = [word for word in own if seen[word] < own.count(word)]
        if short and not kinds:
            self.say(f"turn {at} does not train {', '.join(short)}: {text!r}")
        if kinds & {"content", "calls", "thinking"} and not short and len(group) == 1 and self.shown(at, text):
            self.say(f"turn {at} is called damaged ({', '.join(sorted(kinds))}), but is printed whole")
        thought = set(WORD.findall(thought_of(self.messages[at])))
        for word in own:
            if seen[word] > own.count(word):
                self.say(f"turn {at} trains {word} {seen[word]} times")
        places = [text.find(word) for word in own if word in text and word not in thought]
        content = str(self.messages[at].get("content") or "")
        printed = "</think>" in content and self.plain(content) in self.plain(
            text
        )  # as it stands: to this template the tag is a word
        if (
            len(group) == 1
            and not printed
            and "content" not in kinds
            and any(text.find(word) > min(places, default=len(text)) for word in thought if word in text)
        ):
            self.say(f"turn {at} has its thought behind its text: {text!r}")

    def shown(self, at: int, text: str) -> bool:
        """Whether a turn's targets hold its content, its thought and its calls to the letter."""
        message = self.messages[at]
        calls = [call["function"] for call in message.get("tool_calls") or []]
        names = [call["name"] for call in calls]
        if any(not WORD.search(str(call["arguments"])) for call in calls):
            return False  # its name alone may stand there by chance
        if len(names) > 1 or any(name not in text for name in names):
            return False  # some templates print one alone
        parts = [str(message.get(key) or "").strip() for key in ("content", *THOUGHTS)]
        if any(part and not WORD.search(part) for part in parts):
            return False  # a "7" may stand there by chance
        return sum(map(len, parts)) <= len(text) and all(
            text.count(part) >= parts.count(part) for part in parts if part
        )

    def apart(self, at: int, asked: str, canonical: str, text: str) -> None:
        """A turn whose canonical text does not begin with the asked prompt: prompt, and then the turn's own text."""
        message = self.messages[at]
        opened = next((tag for tag in OPENINGS if asked.rstrip().endswith(tag)), "")
        keyed = OPENINGS.get(opened, "</think>") != "</think>"  # tags in the text are words to this template
        thought = thought_of({**message, "content": ""} if keyed else message).strip()
        after = text
        if opened:
            closing = OPENINGS[opened]
            parts = text.split(closing)
            own_tags = thought.count(closing)  # a thought may speak of the tag
            before, after = closing.join(parts[: own_tags + 1]), closing.join(parts[own_tags + 1 :])
            if len(parts) == 1:
                self.say(f"turn {at} never closes the thought that the prompt opens: {text!r}")
            content = str(message.get("content") or "")
            if closing in content and self.plain(text).startswith(self.plain(content)):  # in the row's own spelling
                after = text.rpartition(closing)[2]
            elif content.count("<think>") > 1 and self.plain(before).endswith(self.plain(thought)):
                pass  # two opening tags before one that closes: where the thought begins is anybody's guess
            elif self.plain(before) != self.plain(thought) and ("thinking", at) not in self.damage:
                self.say(f"turn {at} has the thought {before!r}, not {thought!r}")
        printed, _ = self.up_to_end(at, canonical)
        if not self.plain(printed).endswith(self.plain(after.lstrip())):
            self.say(f"turn {at} ends with {after!r}, the template's text with {printed[-80:]!r}")
        header = re.match(
            r"\s*<[^<>\s]*>", (self.render([NEXT], prompt=True) or "").removeprefix(self.render([NEXT]) or "")
        )
        several = any(sign in canonical for sign in SEVERAL)
        if header and not several and header.group().strip() in text and header.group() not in str(message):
            self.say(f"turn {at} trains a header: {text!r}")
        if opened and not message.get("tool_calls") and ("thinking", at) not in self.damage:
            self.read_back(at, asked, opened, text)

    def read_back(self, at: int, asked: str, opened: str, text: str) -> None:
        """A later prompt prints what the model produced as it prints the row's turn."""
        ends = [*self.options.ends, *self.options.stops]
        end = next((end for token in ends for end in (token, token.replace("▁", " ")) if text.endswith(end)), "")
        body = text.removesuffix(end)
        if self.plain(body) == self.plain(str(self.messages[at]["content"])):
            return  # the row has it as a server returns it
        joined = [last for kind, last in self.kinds if kind == "joined" and last > at]
        alike = [last for last in joined if {one["role"] for one in self.messages[at:last]} == {"assistant"}]
        turn = self.messages[at : 1 + max(alike, default=at)]  # answers that the template joins are one turn
        said = [{"role": "assistant", "content": f"{opened}\n{body}"}]
        before = self.messages[:at]
        as_row, as_said = (self.render([*before, *one, NEXT], prompt=True) for one in (turn, said))
        if as_row is None or self.plain(as_row) == self.plain(as_said or ""):
            return
        if ("not read back", at) not in self.kinds:
            self.say(f"turn {at} is read back otherwise: {as_said and as_said[-120:]!r}, not {as_row[-120:]!r}")

    def unasked(self, at: int, other: list[Run]) -> bool:
        """A turn that nothing can ask for, trained as the whole rendering has it; its run is taken out of `other`."""
        own = set(words(self.messages[at]))
        for run in other:
            if own & set(WORD.findall(self.text(run))) or not own or self.lost(at):
                other.remove(run)
                group = self.group(at)
                self.pieces(at, group, self.text(run))
                if not any(("unasked", one) in self.kinds for one in group):
                    self.say(f"turn {at} cannot be asked for, and that is not said")
                if run.ids[run.end - 1] not in self.tokenizer.added_tokens_decoder:
                    self.say(f"turn {at}, unasked, does not end: {self.text(run)!r}")
                return True
        return False

    def joins(self, at: int) -> bool:
        """Whether a turn is said to be joined to the answer before it; or to be one with an answer nothing asks for."""
        own = ("joined", at) in self.kinds or (("unasked", at) in self.kinds and self.asked(at) is not None)
        return own and at - 1 in self.answers

    def first(self, at: int) -> int:
        """The first of the answers in a row that a turn is joined to."""
        while self.joins(at):
            at -= 1
        return at

    def group(self, at: int) -> list[int]:
        """A turn and the answers behind it that are joined to it."""
        out = [at]
        while self.joins(out[-1] + 1):
            out.append(out[-1] + 1)
        return out

    def asked(self, at: int) -> tuple[str, list[int]] | None:
        """The prompt that asks for a turn: (text, token ids); None: the template refuses."""
        text = self.render(self.messages[:at], prompt=True) if at else None
        if text is None:
            return None
        own = self.tokenizer.apply_chat_template(
            self.messages[:at], tools=self.tools, add_generation_prompt=True, return_dict=False, **self.options.kwargs
        )
        return text, [int(token) for token in own]

    def render(self, messages: Messages, prompt: bool = False) -> str | None:
        """The rendered text; None where the template refuses."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=self.tools, tokenize=False, add_generation_prompt=prompt, **self.options.kwargs
                )
            )
        except Exception:  # templates fail in as many ways as there are templates
            return None

    def plain(self, text: str) -> str:
        """Without whitespace; and without the blanks that some tokenizers put in, or print as blanks."""
        return "".join(text.replace("▁", " ").split())

    def text(self, run: Run) -> str:
        return self.decode(run.ids[run.start : run.end])

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def say(self, text: str) -> None:
        self.wrong.append(text)
