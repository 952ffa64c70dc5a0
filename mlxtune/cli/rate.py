"""mlxtune rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import json_text
from mlxtune_convert.shown import brief, shown_name

from mlxtune.cli import common, thumbs
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.evaluate.comparison.folder import Prompt
    from mlxtune.evaluate.judging.people import Contest, Ratings

LONGEST = 4_000  # characters of a text that are shown
MOST = 9  # evaluations: each answer has one digit
KEYS = "s skip   u undo   q stop, and go on later"


@click.command()
@click.argument("evaluations", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="EVALUATION ...")
@click.option("--likert", is_flag=True, help="Rate each answer from 1 to 5.  [default: compare them]")
@click.option("--rater", default="me", show_default=True, metavar="NAME", help="Who rates: each has a file of ratings.")
@click.option("--result", is_flag=True, help="What was rated so far; nothing is asked.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON document; needs --result.")
def rate(evaluations: tuple[Path, ...], likert: bool, rater: str, result: bool, as_json: bool) -> None:
    """Rate answers in the terminal without knowing whose they are.

    Of one evaluation's folder: base against tuned. Of two: what each of them tuned. Of three and more: a ranking. Each
    decision is kept at once; the same command goes on where you stopped. Who is who is told at the end, with how far
    you agree with the judge of the evaluation and with other raters (Cohen's kappa).

    Of a log of chats (`mlxtune chat --log`): thumbs up or down for the answers that have none.

    \b
    mlxtune rate evals/first
    mlxtune rate evals/first evals/second evals/third
    mlxtune rate evals/first --likert --rater anna
    mlxtune rate evals/first --result --json
    mlxtune rate chats.jsonl
    """
    from mlxtune.evaluate.comparison.folder import Evaluation
    from mlxtune.evaluate.judging.people import Contest, Ratings
    from mlxtune.evaluate.judging.ratings_report import report

    if as_json and not result:
        raise UserError("--json has no effect without --result: a person is asked", "Add --result.")
    if thumbs.are_logs(evaluations):
        if likert:
            raise UserError("--likert has no effect on a log of chats: its answers get thumbs", "Leave it out.")
        if rater != "me":
            raise UserError("--rater has no effect on a log of chats: an answer has one thumb", "Leave it out.")
        thumbs.rate(evaluations, result, as_json)
        return
    if len(evaluations) > MOST:
        raise UserError(f"{len(evaluations)} evaluations are too many to rank at once", f"Name {MOST} at most.")
    contest = Contest.of([Evaluation.read(path) for path in evaluations])
    if contest.samples > 1:
        common.note(f"prompts have up to {contest.samples} answers each: the first one alone is rated")
    ratings = Ratings(contest, rater, likert)
    if ratings.others:
        common.note(f"{ratings.file}: {ratings.others} ratings are of other answers, and do not count")
    out = common.stdout()
    if not result:
        _ask_all(out, ratings)
        left = len(ratings.open_prompts())
        if left:
            every = len(ratings.asked())
            out.print(f"{every - left} of {every} done. The same command goes on.", soft_wrap=True)
            return
    found = report(ratings, rater)
    if as_json:
        click.echo(json_text(found))
    else:
        _draw(out, found)


def _ask_all(out: Console, ratings: Ratings) -> None:
    """Ask until all is decided, or the person stops."""
    contest = ratings.contest
    while waiting := ratings.open_prompts():
        prompt = waiting[0]
        order = contest.shown(prompt)
        every = len(ratings.asked())
        _show(out, contest, prompt, order, f"{every - len(waiting) + 1} of {every}")
        said = _asked(out, ratings.what == "ratings", len(order))
        if said == "q":
            return
        if said == "u":
            if ratings.undo() is None:
                out.print("There is nothing to take back.")
        elif said == "s":
            ratings.decide(prompt.id, None)
        else:
            of_shown = [int(digit) for digit in said]
            ratings.decide(prompt.id, [of_shown[order.index(place)] for place in range(len(order))])


def _asked(out: Console, likert: bool, answers: int) -> str:
    """ "q", "u", "s", or a digit for each answer shown: its rank, or its rating."""
    if likert:
        question = f"1 (bad) to 5 (good) for each answer, as in {'43512'[:answers]}"
    elif answers == 2:
        question = "1 or 2: this one is better   0 neither"
    else:
        question = "The best first, as in 213; equal ones joined, as in 2=13"
    while True:
        out.print(f"{question}   {KEYS}", soft_wrap=True)
        said = _line()
        if said in ("q", "u", "s"):
            return said
        decided = rated(said, answers) if likert else ranks(said, answers)
        if decided:
            return decided
        out.print(f"{said}: not one of these.", soft_wrap=True)


def rated(said: str, answers: int) -> str:
    """A digit from 1 to 5 for each answer, blanks and commas aside; "" where it is none."""
    digits = said.replace(" ", "").replace(",", "")
    return digits if len(digits) == answers and set(digits) <= set("12345") else ""


def ranks(said: str, answers: int) -> str:
    """The rank of each answer as a digit; "" where what was said is no order of them. Of three, 2=13 gives 113: the
    second and the first are the best, the third comes after. Of two, 1, 2 and 0 will do.
    """
    said = said.replace(" ", "").replace(",", "")
    if answers == 2 and said in ("0", "1", "2"):
        return {"0": "11", "1": "12", "2": "21"}[said]
    parts = said.replace("=", "")
    if sorted(parts) != [str(number) for number in range(1, answers + 1)]:
        return ""
    found = [""] * answers
    rank = place = 0
    for index, sign in enumerate(said):
        if sign == "=":
            continue
        place += 1
        if index == 0 or said[index - 1] != "=":
            rank = place
        found[int(sign) - 1] = str(rank)
    return "".join(found)


def _line() -> str:
    """What the person types; "q" at the end of input and for Ctrl-C."""
    try:
        return input("> ").strip().lower()
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return "q"


def _show(out: Console, contest: Contest, prompt: Prompt, order: list[int], title: str) -> None:
    from rich.rule import Rule
    from rich.text import Text

    out.print(Rule(title))
    for message in contest.question(prompt):
        out.print(Text(f"{shown_name(message['role'])}:", style="bold"))
        out.print(Text(_cut(str(message.get("content") or "")), style="dim"))
    for number, place in enumerate(order, 1):
        out.print(Text(f"Answer {number}:", style="bold cyan"))
        out.print(Text(_cut(contest.contestants[place].answers[prompt.id])))


def _cut(text: str) -> str:
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]}\n... {more:,} more characters"


def _draw(out: Console, found: Mapping[str, Any]) -> None:
    """Print what `ratings_report.report` says."""
    names = [brief(shown_name(name)) for name in found["contestants"]]
    out.print(f"{found['rated']} of {found['n']} rated, {found['skipped']} skipped.", soft_wrap=True)
    lines = []
    if found["kind"] == "pairwise" and found["rated"]:
        low, high = found["interval"]
        lines.append(
            f"{names[1]} against {names[0]}: {found['wins']} wins, {found['ties']} ties, {found['losses']} losses"
        )
        lines.append(f"win rate {found['win_rate']:.1%} (95% interval {low:.1%} to {high:.1%})")
        lines.append(f"{found['verdict']} ({found['test']}, p {found['p']:.4f})")
    elif found["kind"] == "likert" and found["rated"]:
        lines += [f"{name}: {mean:.2f}" for name, mean in zip(names, found["means"], strict=True)]
        if "verdict" in found:
            low, high = found["interval"]
            interval = f"95% interval {low:+.2f} to {high:+.2f}"
            lines.append(f"{found['verdict']}: {found['difference']:+.2f} ({interval}, p {found['p']:.4f})")
    elif found["rated"]:
        for entry in sorted(found["ranking"], key=lambda one: -one["share"]):
            low, high = entry["interval"]
            lines.append(f"{entry['name']}: {entry['share']:.1%} of wins to expect ({low:.1%} to {high:.1%})")
    for one in found["agreement"]:
        value = "not defined" if one["kappa"] is None else f"{one['kappa']:.2f}"
        lines.append(f"agrees with {one['with']} on {one['agreed']} of {one['prompts']} prompts, kappa {value}")
    for line in lines:
        out.print(line, soft_wrap=True)
