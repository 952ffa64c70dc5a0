"""Files of known benchmarks, read as suites: a row of each -> a row as the house writes it.

None of these sets comes with mlxtune; whoever has one gives its own file.
"""

from __future__ import annotations

from typing import Any

from mlxtune.evaluate.checks import humaneval


def as_usual(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a known benchmark as one of messages; any other row as it is, with an empty answer where it has none.
    Raises KeyError, TypeError and the like for a row that is not what its columns say.
    """
    if all(column in row for column in humaneval.COLUMNS):
        return humaneval.suite_row(row)
    if "turns" in row and "messages" not in row:
        return _mt_bench(row)
    if isinstance(row.get("question"), list) and "function" in row:
        return _function_calling(row)
    if "prompt" in row and "completion" not in row:
        without = [{"role": "assistant", "content": ""}] if isinstance(row["prompt"], list) else ""
        return {**row, "completion": without}
    if "instruction" in row and not {"output", "response", "instances"} & row.keys():
        return {**row, "output": ""}
    return row


def _mt_bench(row: dict[str, Any]) -> dict[str, Any]:
    """MT-Bench's question.jsonl (Zheng et al. 2023): {"question_id", "category", "turns": ["...", "..."], "reference"}.
    The second turn is asked after the model's own answer to the first.
    """
    first, *others = row["turns"]
    out = {"messages": [{"role": "user", "content": first}], "turns": others}
    for name, key in (("question_id", "id"), ("id", "id")):
        if name in row:
            out[key] = row[name]
    if row.get("category"):
        out["tags"] = [row["category"]]
    if row.get("reference"):
        references = row["reference"]
        first_reference, *later = references if isinstance(references, list) else [references]
        out |= {"reference": first_reference, "turn_references": later}
    return {**{key: row[key] for key in ("checks", "group", "system") if key in row}, **out}


def _function_calling(row: dict[str, Any]) -> dict[str, Any]:
    """BFCL: {"id", "question": [[messages]], "function": [...]}, with the "ground_truth" of its answer file, if it was
    put beside it.
    """
    first, *others = row["question"]
    out = {"messages": first, "functions": row["function"]}
    if others:
        out["turns"] = [message["content"] for turn in others for message in turn]
    if "ground_truth" in row:
        out["checks"] = [{"tool_call": True, "possible": row["ground_truth"]}]
    return {**{key: row[key] for key in ("id", "checks", "group", "tags") if key in row}, **out}
