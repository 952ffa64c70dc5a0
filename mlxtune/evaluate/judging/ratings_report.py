"""What people's ratings show, and how far they agree with a judge and with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mlxtune_convert.files import matching

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.evaluate.comparison.folder import VERDICTS, Evaluation
from mlxtune.evaluate.judging.people import Contest, Ratings
from mlxtune.evaluate.statistics.agreement import kappa
from mlxtune.evaluate.statistics.holm import verdict
from mlxtune.evaluate.statistics.paired import compare_scores, wins_against_losses
from mlxtune.evaluate.statistics.ranking import ranking

OUTCOMES = {1: "win", 0: "tie", -1: "loss"}  # of the second contestant


def report(ratings: Ratings, rater: str) -> dict[str, Any]:
    """The document that `mlxtune rate --result --json` prints."""
    contest = ratings.contest
    values = ratings.values()
    document: dict[str, Any] = {
        "rater": rater,
        "kind": _kind(ratings),
        "contestants": [one.name for one in contest.contestants],
        "n": len(contest.prompts),
        "rated": len(values),
        "skipped": sum(one.values is None for one in ratings.decided.values()),
        "left": len(ratings.open_prompts()),
    }
    if values:
        document |= _result(ratings, values)
    document["agreement"] = _agreements(ratings, rater, values)
    return document


def _kind(ratings: Ratings) -> str:
    if ratings.what == "ratings":
        return "likert"
    return "pairwise" if len(ratings.contest.contestants) == 2 else "ranking"


def _result(ratings: Ratings, values: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """values: the prompt's id -> what was said of each contestant; at least one."""
    contest = ratings.contest
    table = np.array(list(values.values()), float)  # [prompts, contestants]
    groups = [prompt.group for prompt in contest.prompts if prompt.id in values]
    if ratings.what == "ratings":
        result: dict[str, Any] = {"means": table.mean(axis=0).tolist()}
        if len(contest.contestants) == 2:
            found = compare_scores(table[:, :1], table[:, 1:], graded=True, groups=groups)
            result |= {"difference": found.difference, "interval": list(found.interval), "p": found.p}
            result["verdict"] = verdict(found.difference, found.p)
        return result
    if len(contest.contestants) > 2:
        ranks = ranking(_wins(table))
        return {"ranking": [{"name": c.name, **asdict(r)} for c, r in zip(contest.contestants, ranks, strict=True)]}
    ahead = np.sign(table[:, 0] - table[:, 1])  # the second one's rank is the smaller: it wins
    wins, losses = int((ahead > 0).sum()), int((ahead < 0).sum())
    tuned = (ahead[:, None] + 1) / 2
    compared = compare_scores(1 - tuned, tuned, graded=False, groups=groups)
    low, high = compared.interval
    p, test = wins_against_losses(ahead, groups)
    return {
        "wins": wins,
        "ties": len(ahead) - wins - losses,
        "losses": losses,
        "win_rate": float(tuned.mean()),
        "interval": [(1 + low) / 2, (1 + high) / 2],
        "p": p,
        "test": test,
        "verdict": verdict(wins - losses, p),
    }


def _wins(ranks: np.ndarray) -> np.ndarray:
    """[prompts, contestants, contestants] as `statistics.ranking` takes them. ranks: [prompts, contestants]."""
    contestants = ranks.shape[1]
    wins: np.ndarray = (np.sign(ranks[:, None, :] - ranks[:, :, None]) + 1) / 2
    wins[:, np.arange(contestants), np.arange(contestants)] = 0
    return wins


def _agreements(ratings: Ratings, rater: str, values: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """With the judge of the evaluation, and with each other rater of the same answers, by kappa; of two contestants."""
    contest = ratings.contest
    if ratings.what != "ranks" or len(contest.contestants) != 2:
        return []
    mine = _outcomes(values)
    others = {}
    if contest.is_of_one:
        others[_judge_named(contest)] = _of_judge(contest)
    for file in matching(contest.folder, "ratings.*.jsonl"):
        name = file.name.removeprefix("ratings.").removesuffix(".jsonl")
        if name != rater and "." not in name:
            others[name] = _outcomes(Ratings(contest, name, likert=False).values())
    found = []
    for name, theirs in others.items():
        common = [id for id in mine if id in theirs]
        if common:
            agreed = sum(mine[id] == theirs[id] for id in common)
            value = kappa([mine[id] for id in common], [theirs[id] for id in common])
            found.append({"with": name, "prompts": len(common), "agreed": agreed, "kappa": value})
    return found


def _outcomes(values: Mapping[str, Sequence[int]]) -> dict[str, str]:
    return {id: OUTCOMES[(first > second) - (first < second)] for id, (first, second) in values.items()}


def _judge_named(contest: Contest) -> str:
    """Of a judge whose exam was failed, its verdicts are there because of --anyway: that is said wherever they are."""
    judge = Evaluation.read(contest.folder).summary.get("judge")
    exam = judge.get("exam") if isinstance(judge, dict) else None
    failed = isinstance(exam, dict) and exam.get("passed") is False
    return "the judge, which failed its exam" if failed else "the judge"


def _of_judge(contest: Contest) -> dict[str, str]:
    """What the judge of the evaluation said of the first answers, where there was one."""
    file: Path = contest.folder / VERDICTS
    if not file.is_file():
        return {}
    found = {}
    for row in raw_rows(file):
        if not isinstance(row, Bad):
            _, line = row
            if line.get("sample") == 0 and line.get("outcome") in OUTCOMES.values():
                found[str(line["id"])] = str(line["outcome"])
    return found
