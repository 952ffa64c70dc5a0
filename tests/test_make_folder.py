"""A making goes on to the same bytes, loses no more than a batch that fails, and spends no more than it may."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from made import Scripted, lines, making

from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make.folder import OURS, Failed, Making, Rejected, Row, Spent, Yield
from mlxtune.make.guard import Guard


def echo(request: Request) -> str:
    return f"answer to {request.id}"


def requests(first: int, count: int) -> list[Request]:
    return [Request(f"r{first + n}", [{"role": "user", "content": "?"}]) for n in range(count)]


def maker(one: Making) -> None:
    """Asks three times; what it asks depends on the answers before. Every fourth answer is rejected."""
    with one:
        first = 0
        for _ in range(3):
            for found in one.ask(requests(first, 6)):
                assert isinstance(found, Answer)
                if int(found.id[1:]) % 4:
                    one.keep(Row([{"role": "assistant", "content": found.text}], one.made([found.id])))
                else:
                    one.reject(Rejected({"text": found.text}, "empty", "of a test"))
            first += len(one.rows)
        one.finish(Yield("rows", 18))


def held(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_making_that_is_killed_anywhere_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = Scripted(echo)
    maker(making(tmp_path / "whole", whole))
    assert set(held(tmp_path / "whole")) < set(OURS) and len(whole.asked) == 18
    for most in range(0, 18, 4):
        out, left = tmp_path / str(most), most

        def dies(request: Request) -> str:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return echo(request)

        with pytest.raises(KeyboardInterrupt):
            maker(making(out, Scripted(dies)))
        with (out / "journal.jsonl").open("ab") as file:
            file.write(b'{"side": "1", "id"')  # the line in which it was killed
        second = Scripted(echo)
        maker(making(out, second))
        assert held(out) == held(tmp_path / "whole")
        assert len(second.asked) < 18 or most < 4


def test_what_is_kept_says_where_it_comes_from_and_what_is_not_says_why(tmp_path: Path) -> None:
    maker(making(tmp_path, Scripted(echo)))
    kept, rejected = lines(tmp_path / "train.jsonl"), lines(tmp_path / "rejected.jsonl")
    assert kept[0] == {
        "messages": [{"role": "assistant", "content": "answer to r1"}],
        "made": {"how": "testing", "engine": "scripted", "parents": ["r1"], "scores": {}},
    }
    assert rejected[0] == {"text": "answer to r0", "reason": "empty", "detail": "of a test"}
    card = (tmp_path / "card.md").read_text()
    assert "Check the engine's terms before you publish" in card and "`scripted`" in card and "empty: has no" in card


def test_a_batch_that_fails_loses_itself_alone_and_stays_lost(tmp_path: Path) -> None:
    """Four of nine do, never two in a row."""

    def answers(request: Request) -> str:
        if int(request.id[1:]) % 8 == 5:
            raise UserError("the server is busy")
        return echo(request)

    with making(tmp_path, Scripted(answers)) as one:
        found = one.ask(requests(0, 36))
        lost = [answer for answer in found if isinstance(answer, Failed)]
        expected = [(f"r{n}", "the server is busy") for n in range(36) if n // 4 % 2]
        assert [(one.id, one.why) for one in lost] == expected
        assert [answer.text for answer in found if isinstance(answer, Answer)][-1] == "answer to r35"
        document = one.finish(Yield("rows", 36))
    assert (document["requests"], document["failed"]) == (36, 16)
    assert document["notes"] == ["16 requests have no answer: the server is busy"]
    again = Scripted(echo)  # not asked: what the later ones were made from must not change
    with making(tmp_path, again) as one:
        assert one.ask(requests(0, 36)) == found and not again.asked


def test_an_engine_that_is_gone_ends_the_making_and_what_it_refused_last_is_asked_again(tmp_path: Path) -> None:
    def answers(request: Request) -> str:
        if int(request.id[1:]) > 3:
            raise UserError("no server answers")
        return echo(request)

    gone = Scripted(answers)
    with making(tmp_path, gone) as one, pytest.raises(UserError, match="no server answers"):
        one.ask(requests(0, 40))
    assert [request.id for request in gone.asked][4::4] == ["r4", "r8", "r12"]  # three batches in a row are enough
    back = Scripted(echo)
    with making(tmp_path, back) as one:
        assert all(isinstance(answer, Answer) for answer in one.ask(requests(0, 40)))
    assert back.asked[0].id == "r4"


def test_prompts_that_can_never_be_asked_end_no_making_and_stay_refused(tmp_path: Path) -> None:
    class Choosy(Scripted):
        def plan(self, requests: Sequence[Request]) -> list[list[int]]:
            if refused := [one.id for one in requests if int(one.id[1:]) % 4 == 1]:
                raise UserError(f"prompt {refused[0]}: the template refuses it")
            return super().plan(requests)

    with making(tmp_path, Choosy(echo)) as one:
        found = one.ask(requests(0, 36))  # nine of them are refused, one after the other
        assert [answer.id for answer in found if isinstance(answer, Failed)] == [f"r{n}" for n in range(1, 36, 4)]
        notes = one.finish(Yield("rows", 36))["notes"]
    assert notes[0] == "1 requests have no answer: prompt r1: the template refuses it" and len(notes) == 6
    assert notes[-1] == "4 requests more have no answer, each for a reason of its own"
    again = Scripted(echo)
    with making(tmp_path, again) as one:
        assert one.ask(requests(0, 36)) == found and not again.asked


def test_no_more_is_asked_than_may_be_and_more_may_be_asked_later(tmp_path: Path) -> None:
    few = Scripted(echo)
    with making(tmp_path, few, most_requests=9) as one:
        one.ask(requests(0, 6))
        found = one.ask(requests(6, 6))
        assert [isinstance(answer, Answer) for answer in found] == [True] * 3 + [False] * 3
        with pytest.raises(Spent, match="--max-requests 9"):
            one.ask(requests(12, 6))
    assert len(few.asked) == 9
    more = Scripted(echo)
    with making(tmp_path, more, most_requests=16) as one:
        assert all(isinstance(answer, Answer) for answer in one.ask(requests(0, 6)) + one.ask(requests(6, 6)))
        assert sum(isinstance(answer, Answer) for answer in one.ask(requests(12, 6))) == 4
    assert [request.id for request in more.asked] == [f"r{n}" for n in range(9, 16)]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    maker(making(tmp_path / "made", Scripted(echo)))
    before = held(tmp_path / "made")
    with pytest.raises(UserError, match="holds another making: how changed") as caught:
        making(tmp_path / "made", Scripted(echo), how="other")
    assert "--force" in caught.value.hint and held(tmp_path / "made") == before
    with making(tmp_path / "made", Scripted(echo), how="other", force=True) as one:
        assert one.ask(requests(0, 1)) and not (tmp_path / "made" / "train.jsonl").exists()
        before = held(tmp_path / "made")
        with pytest.raises(UserError, match="another process is answering"):
            making(tmp_path / "made", Scripted(echo), how="third", force=True)
        assert held(tmp_path / "made") == before
    (tmp_path / "made" / ".train.jsonl.partial-12").write_text("{")  # as a kill leaves it
    making(tmp_path / "made", Scripted(echo), how="third", force=True).close()
    assert sorted(held(tmp_path / "made")) == ["journal.jsonl", "making.json"]
    (tmp_path / "made" / "thesis.txt").write_text("mine")
    for folder in ("made", "mine"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match=r"holds thesis.txt"):
            making(tmp_path / folder, Scripted(echo), how="third", force=True)
    assert (tmp_path / "made" / "making.json").is_file()


def test_rows_of_which_one_holds_what_is_guarded_are_rejected_together(tmp_path: Path) -> None:
    secret = "The fire brigade of Elmtown keeps its forks in the cellar."
    good, bad = ([{"role": role, "content": text}] for role, text in (("user", "Hello."), ("assistant", secret)))
    with making(tmp_path, Scripted(echo)) as one:
        one.guard = Guard([secret])
        assert one.keep(Row(good, one.made())) and not one.keep(Row(good, one.made()), Row(bad, one.made()))
        one.finish(Yield("rows", 3))
    assert [row["messages"] for row in lines(tmp_path / "train.jsonl")] == [good]
    found = lines(tmp_path / "rejected.jsonl")
    assert [(row["messages"], row["reason"]) for row in found] == [(good, "guarded"), (bad, "guarded")]
    assert "forks" in found[0]["detail"]


def test_a_reason_that_is_not_explained_is_a_fault_of_the_maker() -> None:
    with pytest.raises(KeyError, match="no code"):
        Rejected({}, "dull")
