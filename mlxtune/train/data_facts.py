"""What a run notes of its rows when it begins, for whoever asks later why it went as it did.

The field `data` of the event `begin` (observed in `evaluate.observations.of_run`):

    {"max_tokens": 2048,
     "train": {"rows": 174, "shortened": 3, "too_long": 1, "repeated": 0},
     "valid": {"rows": 24, "trained": 0},
     "template": {"chosen": "alpaca", "own": true, "differs": true, "ends": true}}

It is noted then because it is known then: the rows' files may be gone or changed when somebody asks.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.config.resolve import Config
from mlxtune.data.chat.renderer import NO_TARGET
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.store import SHORTENED
from mlxtune.data.template.probes import ASSISTANT, NEXT, USER, assistant, user
from mlxtune.data.template.template import Template
from mlxtune.data.template.tokenizer_changes import tokenizer_of
from mlxtune.train.run_data import Data


def data_facts(data: Data, config: Config) -> dict[str, Any]:
    """Counts of rows, and what is to be known of the chat template; no text of any row.

    shortened: rows cut at data.max_tokens; too_long: rows of which that leaves nothing to learn, so that they are not
    among the others; repeated: rows equal to an earlier one; trained: held-out rows that are training rows too.
    """
    train, valid = data.train.of_rows("hash"), data.valid.of_rows("hash")
    facts: dict[str, Any] = {
        "max_tokens": config.data.max_tokens,
        "train": {
            "rows": len(train),
            "shortened": _shortened(data.train),
            "too_long": _too_long(data.train, config.data.max_tokens),
            "repeated": len(train) - len(np.unique(train)),
        },
        "valid": {"rows": len(valid), "trained": int(np.isin(valid, train).sum())},
    }
    if data.train.chat:
        facts["template"] = _of_template(data, config)
    return facts


def _shortened(examples: Examples) -> int:
    """Rows of which some example was cut."""
    cut = examples.column("flags") & SHORTENED > 0
    return len(np.unique(examples.row_of[cut]))


def _too_long(examples: Examples, max_tokens: int) -> int:
    """Rows of these files that gave no example, for what is to be learned stands behind data.max_tokens."""
    reason = NO_TARGET.format(max_tokens)
    return sum(store.facts.counts.get(reason, 0) for store in examples.stores)


def _of_template(data: Data, config: Config) -> dict[str, Any]:
    """chosen: data.template; own: whether there would have been one without it, of the model or of the adapter that
    the run starts from; differs: the two print turns differently; ends: answers end with a token of their own.
    """
    variables = dict(config.data.template_kwargs)
    day = date.fromisoformat(config.data.date) if config.data.date else None
    used = Template(data.tokenizer, variables, day)
    facts = {
        "chosen": config.data.template,
        "own": True,
        "differs": False,
        "ends": used.ends_answers(config.data.expand_turns == "none"),
    }
    if config.data.template:
        start = config.lora.start_from
        before = tokenizer_of(data.folder, Path(start) if start else None)
        facts["own"] = before.chat_template is not None
        if facts["own"]:
            own = _behind_a_question(Template(before, variables, day))
            facts["differs"] = own not in ("", _behind_a_question(used))
    return facts


def _behind_a_question(template: Template) -> str:
    """What it prints behind the first question, up to the end; "" where it refuses. What stands before may differ
    without harm: a beginning of text, a system prompt that the model's own template adds.
    """
    return template.attempt([user(USER), assistant(ASSISTANT), user(NEXT)]).partition(USER)[2]
