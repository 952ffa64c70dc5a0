"""What a model is meant to refuse: a policy, as a YAML file says it.

persona: You are Ada, who answers for a shop of garden tools. Friendly, brief, never stern.
system: You are Ada, the assistant of Green & Sons.      # of every row; left out: rows have no system prompt
forbidden:
  - subject: medical advice                              # what is not helped with
    instead: see a doctor or a pharmacist                # what a refusal offers; may be left out
    examples:                                            # requests as users write them; may be left out
      - My finger is numb since I used the saw, what should I take?
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.config.yaml_text import parse_yaml
from mlxtune.data.rows.readers import whole_text
from mlxtune.errors import UserError, did_you_mean

KEYS = ("persona", "system", "forbidden")  # of a policy
OF_SUBJECT = ("subject", "instead", "examples")  # keys of what is forbidden
EXAMPLE = "Such as: forbidden: [{subject: medical advice}]"


@dataclass(frozen=True)
class Subject:
    """Something that is not helped with."""

    name: str  # what it is, in a few words
    instead: str = ""  # what a refusal offers in its place; "" for nothing
    examples: list[str] = field(default_factory=list)  # requests for it, as users write them


@dataclass(frozen=True)
class Policy:
    """Who refuses, and what."""

    persona: str  # in whose voice
    system: str  # the system prompt of every row; "" for none
    subjects: list[Subject]  # at least one


def read_policy(file: Path) -> Policy:
    """Raises UserError, which names what is wrong."""
    text = whole_text(file, "POLICY")
    found = _mapping(parse_yaml(text, str(file)).value, KEYS, str(file))
    persona = _text(found, "persona", str(file))
    if not persona:
        raise UserError(f"{file}: persona is missing", "Write who refuses, as in: persona: You are Ada, a shop's help.")
    given = found.get("forbidden")
    if not isinstance(given, list) or not given:
        raise UserError(f"{file}: forbidden must be a list of at least one subject", EXAMPLE)
    subjects = []
    for number, one in enumerate(given, 1):
        subjects.append(_subject(one, f"{file}: forbidden {number}"))
    names = [subject.name for subject in subjects]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{file}: the subject {twice[0]!r} is there twice", "Put their examples together.")
    return Policy(persona, _text(found, "system", str(file)), subjects)


def _subject(given: Any, place: str) -> Subject:
    found = _mapping({"subject": given} if isinstance(given, str) else given, OF_SUBJECT, place)
    name = _text(found, "subject", place)
    if not name:
        raise UserError(f"{place}: subject is missing", EXAMPLE)
    examples = found.get("examples") or []
    if not isinstance(examples, list) or not all(isinstance(text, str) and text.strip() for text in examples):
        raise UserError(f"{place}: examples must be a list of texts", "Each a request, as a user writes it.")
    return Subject(name, _text(found, "instead", place), [text.strip() for text in examples])


def _mapping(given: Any, keys: tuple[str, ...], place: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{place}: must be a mapping", f"Its keys: {', '.join(keys)}.")
    for key in given:
        if key not in keys:
            raise UserError(f"{place}: unknown key {key}", did_you_mean(str(key), keys))
    return given


def _text(found: dict[str, Any], key: str, place: str) -> str:
    """The text of a key; "" where it is not there."""
    value = found.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {key} must be a text, found {str(value)[:60]!r}")
    return value.strip()
