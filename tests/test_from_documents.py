"""mlxtune make from-documents: what is read, how it is cut, what is asked, and that unfounded answers do not stay."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import tiny
from made import CUT, Scripted, lines, reasons

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.words import words_of
from mlxtune.evaluate.engines.request import Request
from mlxtune.make.documents.absent import Kept, does_not_answer
from mlxtune.make.documents.asking import Pair, parsed
from mlxtune.make.documents.chunks import Chunk, chunks, estimated
from mlxtune.make.documents.grounding import fault_of
from mlxtune.make.documents.maker import FromDocuments, Wanted, expected_requests
from mlxtune.make.documents.reading import Block, Document, find, html, markdown, read
from mlxtune.make.guard import Guard

DOCUMENTS = Path(__file__).resolve().parent / "documents"
PAIRS = lines(DOCUMENTS / "pairs.jsonl")
PAGE = """<html><head><title>no</title></head><body>
<nav>Menu</nav><h1>Opening <b>hours</b></h1>
<p>We open<br>at 9&nbsp;o'clock.</p><script>no()</script><h2>Shop</h2>
<table><tr><th>Day</th><td>Monday</td></tr></table>
</body></html>"""


def text_of(name: str) -> str:
    return (DOCUMENTS / name).read_text(encoding="utf-8")


def faults(founded: bool) -> list[tuple[str, str]]:
    """(The reason against each pair of the fixture, "" for none; the reason that was planted)."""
    found = []
    for row in PAIRS:
        if row["founded"] == founded:
            fault = fault_of(Pair(row["question"], row["answer"], row["quote"]), text_of(row["document"]))
            found.append((fault.reason if fault else "", row.get("why", "")))
    return found


def test_all_planted_unfounded_answers_are_rejected_and_nearly_all_true_ones_kept() -> None:
    planted, true = faults(founded=False), faults(founded=True)
    assert len(planted) == len(true) == 20
    assert [found for found, _ in planted] == [why for _, why in planted]
    assert len({why for _, why in planted}) == 6  # of each kind some
    assert sum(found == "" for found, _ in true) >= 18


@pytest.mark.parametrize(
    ("question", "founded"),
    [
        ("What does the text say about shoes?", False),
        ("Which text editor does the shop use?", True),
        ("Who is mentioned above?", False),
        ("How high above the sea is the shop?", True),
        ("Was steht im Abschnitt über Gutscheine?", False),
        ("Que dit le texte sur les bons ?", True),  # not found out: another way to point
        ("Selon le texte, qui paie ?", False),
        ("¿Qué dice según el texto la tienda?", False),
        ("根据本文，谁付邮费？", False),
    ],
)
def test_a_question_that_points_at_the_text_is_found(question: str, founded: bool) -> None:
    fault = fault_of(Pair(question, "The buyer pays the postage.", "The buyer pays the postage"), text_of("returns.md"))
    assert (fault is None) == founded


def test_documents_of_each_kind_become_headings_and_paragraphs(tmp_path: Path) -> None:
    page = [Block("Opening hours", 1), Block("We open at 9 o'clock."), Block("Shop", 2), Block("Day | Monday")]
    assert html(PAGE) == page
    text = "---\ntitle: no\n---\nHours\n=====\nOne\ntwo\n\n## Shop ##\n```\n# no heading\n\nx\n```\n- item\n---\n"
    blocks = [Block("Hours", 1), Block("One\ntwo"), Block("Shop", 2)]
    assert list(markdown(text))[:3] == blocks
    assert list(markdown(text))[3].text.startswith("```\n# no heading\n\nx\n```")
    for text in (
        "<head><title>no</title><meta name=x><h1>Yes</h1><p>Read.",
        "<!doctype html><title>no<body><h1>Yes</h1>Read.",
        "<html><head><title>no</head><body><div><nav>Menu<ul><li>One</ul></div><h1>Yes</h1><p>Read.",
        "<body><nav>Menu<div>One</div><main><h1>Yes</h1>Read.</main><footer><nav>Menu</nav></footer>",
        "<svg><title>no</title></svg><h1>Yes</h1><template><article>no</article></template>Read.",
    ):
        assert html(text) == [Block("Yes", 1), Block("Read.")], text
    assert html("<nav><a>Menu</a><p>Read.<script>no(") == [Block("Menu"), Block("Read.")]
    (tmp_path / "prices.csv").write_text("item;price\nshoe;5\nsock;\n")
    assert read("prices.csv", tmp_path / "prices.csv").blocks == [Block("item: shoe\nprice: 5"), Block("item: sock")]
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n \n\nthree", encoding="utf-8")
    assert read("a.txt", tmp_path / "a.txt").blocks == [Block("one\ntwo"), Block("three")]


def test_word_and_pdf_documents_are_read_by_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docx = pytest.importorskip("docx")
    written = docx.Document()
    written.add_heading("Hours", 1)
    written.add_paragraph("We open at nine.")
    written.add_table(1, 2).rows[0].cells[1].text = "Monday"
    written.save(tmp_path / "a.docx")
    assert read("a", tmp_path / "a.docx").blocks == [Block("Hours", 1), Block("We open at nine."), Block("| Monday")]
    (tmp_path / "a.pdf").write_bytes(a_pdf("We open at nine."))
    pytest.importorskip("pypdf")
    assert read("a", tmp_path / "a.pdf").blocks == [Block("We open at nine.")]
    (tmp_path / "b.pdf").write_bytes(b"no")
    (tmp_path / "b.docx").write_bytes(b"no")
    for name in ("b.pdf", "b.docx"):
        with pytest.raises(UserError, match="can be read"):
            read(name, tmp_path / name)
    for package, name in (("pypdf", "a.pdf"), ("docx", "a.docx")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match="package") as raised:
            read(name, tmp_path / name)
        assert "mlxtune[documents]" in raised.value.hint


def a_pdf(text: str) -> bytes:
    """A page of one line, as the format's own specification builds it (ISO 32000-1, annex H.3)."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)


def test_a_folder_gives_its_documents_and_says_what_else_there_is(tmp_path: Path) -> None:
    for name in ("b/one.md", "a.txt", ".hidden/x.md", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    found, notes = find([tmp_path, tmp_path / "a.txt"])
    assert [name for name, _ in found] == ["a.txt", "b/one.md"]
    assert len(notes) == 1 and "1 files are of other types" in notes[0]
    folders = [tmp_path / "x/docs", tmp_path / "y/docs"]
    for folder in folders:
        (folder / "en").mkdir(parents=True)
        (folder / "en/one.md").write_text("text")
    names = [name for name, _ in find([*folders, tmp_path / "b"])[0]]
    assert names == ["x/docs/en/one.md", "y/docs/en/one.md", "one.md"]
    for path, said in ((tmp_path / "no", "no document"), (tmp_path / "picture.png", "unknown kind")):
        with pytest.raises(UserError, match=said):
            find([path])


def test_chunks_end_at_headings_or_paragraphs_and_begin_with_the_end_of_the_one_before() -> None:
    def count(text: str) -> int:
        return len(text.split())

    blocks = [Block("A", 1), Block("a1. " * 6), Block("B", 1), Block("one two. three."), Block("four. " * 8)]
    found = chunks(Document("d", blocks), count, size=10, overlap=2)
    assert [chunk.id for chunk in found] == ["d#1", "d#2", "d#3"]
    assert found[0].text == "A\n\n" + "a1. " * 6 and found[1].text == "B\n\none two. three."
    assert found[2].text == "B\n\nthree.\n\n" + "four. " * 8
    long = [Block(" ".join(f"w{n} x y." for n in range(40)))]
    parts = chunks(Document("d", long), count, size=30, overlap=5)
    assert all(count(chunk.text) <= 30 for chunk in parts) and len(parts) > 3
    assert {f"w{n}" for n in range(40)} <= set(" ".join(chunk.text for chunk in parts).split())
    assert all(chunk.text.endswith("y.") for chunk in parts)
    assert estimated("one two three") == 4
    endless = chunks(Document("d", [Block("word" * 400)]), len, size=100, overlap=10)
    assert "".join("".join(chunk.text.split()) for chunk in endless) == "word" * 400


def pair(question: str = "q", answer: str = "a", quote: str = "c") -> str:
    return json.dumps({"question": question, "answer": answer, "quote": quote})


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        (pair() + "\n" + pair("r"), 2, []),
        ("Sure!\n```json\n[" + pair() + ",\n" + pair("r") + "]\n```", 2, []),
        ('{"pairs": [' + pair() + "]}", 1, []),
        (pair() + '\n{"question": "r", "answer": 5, "quote": "c"}', 1, ["unparseable"]),
        (pair() + '\n{"question": "r", "answer": ""}', 1, ["unparseable"]),
        (pair() + '\n{"question": "r", "ans' + CUT, 1, ["cut"]),
        ("Question: q\nAnswer: a\nQuote: c", 1, []),
        (
            "1. **Question:** q\n   **Answer:** a\n   **Quote:** c\n2. **Question:** r\n   **Answer:** b",
            1,
            ["unparseable"],
        ),
        ("Question: q\nAnswer: a\nQuote: c\nQuestion: r\nAnswer: b\nQuote: c" + CUT, 1, ["cut"]),
        ("Question: What is {name}?\nAnswer: a\nQuote: c", 1, []),
        ("I cannot do that.", 0, ["unparseable"]),
        ("", 0, ["unparseable"]),
    ],
)
def test_answers_are_read_strictly_as_json_or_as_lines_with_labels(text: str, good: int, bad: list[str]) -> None:
    pairs, others = parsed(text.removesuffix(CUT), text.endswith(CUT))
    assert len(pairs) == good and [reason for reason, _ in others] == bad
    assert all(one.answer in ("a", "b") and one.quote == "c" for one in pairs)


def numbered(count: int) -> list[Chunk]:
    """Chunks on streets that have nothing in common but their form."""
    return [
        Chunk("town.md", n, f"The market of quarter {n} is in Elm{chr(96 + n)} street. It has {n}0 stalls.")
        for n in range(1, count + 1)
    ]


def honest(request: Request) -> str:
    """A good pair of a numbered chunk."""
    n = int(request.id.rpartition("#")[2])
    question = f"Where is market number {n}?" if n == 3 else f"In which street lies the one of quarter {n}?"
    return pair(question, f"In Elm{chr(96 + n)} street.", f"is in Elm{chr(96 + n)} street")


def make(
    out: Path, answers: Callable[[Request], str], wanted: Wanted, texts: list[Chunk], **more: Any
) -> dict[str, Any]:
    """The document of a making out of chunks. The questions of these chunks are alike, which is not what is tried."""
    guard = more.pop("guard", Guard(["Where is market number 3?"]))
    with made.making(out, Scripted(answers), "from-documents", **more) as one:
        maker = FromDocuments(one, texts, guard, wanted)
        return one.finish(*maker.run())


def test_a_making_keeps_what_is_shown_and_says_of_the_rest_why(tmp_path: Path) -> None:
    texts = [*numbered(5), *(Chunk("last.md", n, "") for n in range(5))]  # four are asked together
    answers = {
        "town.md#1": honest(Request("#1", []))
        + pair("How many stalls are there?", "Some 99 of them.", "It has 10 stalls"),
        "town.md#2": pair("Which quarter has Elmb street?", "Quarter 2 has it.", "quarter 2 is in Elmb")
        + 2 * pair("Is it?")
        + "\n{no}",
        "town.md#3": honest(Request("#3", [])),  # guarded
        "town.md#4": pair("Who sells fish on Fridays?", "Nobody does.", "Nobody sells fish there") + pair("", "", ""),
        "town.md#5": pair("In which street lies the one of quarter 2, and 1?", "In Elme street.", "is in Elme street"),
    }

    def answer(request: Request) -> str:
        if request.id == "last.md#4":
            raise UserError("out of memory")
        return answers.get(request.id, "")

    document = make(tmp_path / "made", answer, Wanted(per_chunk=2), texts)
    kept = lines(tmp_path / "made" / "train.jsonl")
    assert [row["made"]["parents"] for row in kept] == [["town.md#1"], ["town.md#2"]]
    assert kept[0]["messages"] == [
        {"role": "user", "content": "In which street lies the one of quarter 1?"},
        {"role": "assistant", "content": "In Elma street."},
    ]
    assert kept[0]["made"]["quote"] == "is in Elma street" and kept[0]["made"]["how"] == "from-documents"
    found = {reason: len(some) for reason, some in reasons(tmp_path / "made").items()}
    expected = {
        "unfounded number": 1,
        "near duplicate": 1,
        "unparseable": 5,
        "guarded": 1,
        "not quoted": 1,
        "short quote": 1,
        "too many": 1,
    }
    assert found == expected
    assert document["kept"] == 2 and document["wanted"] == 20 and document["failed"] == 2


def test_the_count_ends_it_and_a_poor_engine_too(tmp_path: Path) -> None:
    texts = [Chunk(f"{n}.md", 1, f"{word} lives in Rome.") for n, word in enumerate(words_of(NAMES))]

    def answer(request: Request) -> str:
        name = words_of(NAMES)[int(request.id.partition(".")[0])]
        return pair(f"{name} {name[::-1]} {name}?", "In Rome.", f"{name} lives in Rome")

    document = make(tmp_path / "few", answer, Wanted(per_chunk=1, count=5), texts)
    assert (document["kept"], document["requests"], document["stopped"]) == (5, 8, "")
    assert expected_requests(texts, Wanted(1, count=5)) == 8 and expected_requests(texts, Wanted(3, count=51)) == 32
    document = make(tmp_path / "spent", answer, Wanted(per_chunk=1), texts, most_requests=40)
    assert document["kept"] == 40 and "--max-requests 40" in document["stopped"]
    document = make(tmp_path / "poor", lambda _: "no", Wanted(per_chunk=1), texts)
    assert document["kept"] == 0 and document["requests"] == 96 and "hardly anything" in document["stopped"]


NAMES = " ".join(f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("rt", "nso", "lpa"))


def test_what_the_engine_knows_without_the_text_does_not_stay_with_closed(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        if not request.id.startswith("closed:"):
            return honest(request)
        return "It is in Elmb street." if "#2:" in request.id else "I do not know, perhaps in Elm street."

    texts = [numbered(2)[0], Chunk("other.md", 2, "A baker has moved to Elmb street this year.")]
    answers = {
        "town.md#1": honest,
        "other.md#2": lambda _: pair("Whither went the baker?", "To Elmb street.", "has moved to Elmb street"),
    }
    make(tmp_path / "made", lambda one: answers.get(one.id, answer)(one), Wanted(1, closed=True), texts)
    assert [row["made"]["parents"] for row in lines(tmp_path / "made" / "train.jsonl")] == [["town.md#1"]]
    assert [row["question"] for row in reasons(tmp_path / "made")["known"]] == ["Whither went the baker?"]


def test_a_text_beside_a_question_must_not_hold_what_is_guarded_either(tmp_path: Path) -> None:
    texts = [*numbered(2), Chunk("suite.md", 3, "Fish is sold here on Fridays. It is in Elmc street, as bread is.")]
    make(tmp_path / "made", honest, Wanted(1, with_text=True), texts, guard=Guard([texts[2].text]))
    assert [row["made"]["parents"] for row in lines(tmp_path / "made" / "train.jsonl")] == [["town.md#1"]]
    (guarded,) = reasons(tmp_path / "made")["guarded"]
    assert texts[2].text in guarded["messages"][0]["content"]


def test_unanswerable_questions_are_those_of_other_chunks_beside_a_text_that_does_not_answer_them(
    tmp_path: Path,
) -> None:
    names = [text_of(name) for name in ("returns.md", "comet.txt", "hausordnung.md")]
    texts = [Chunk(name, 1, text) for name, text in zip("abc", names, strict=True)]
    wanted = {"a": "returns.md", "b": "comet.txt", "c": "hausordnung.md"}
    true = [row for row in PAIRS if row["founded"]]

    def answer(request: Request) -> str:
        rows = [row for row in true if row["document"] == wanted[request.id[0]]]
        return "\n".join(pair(row["question"], row["answer"], row["quote"]) for row in rows)

    document = make(tmp_path / "made", answer, Wanted(9, unanswerable=0.25, with_text=True), texts)
    rows = lines(tmp_path / "made" / "train.jsonl")
    absent = [row for row in rows if row["made"].get("unanswerable")]
    assert document["rows"] == len(rows) and len(absent) == round(len(rows) / 4) >= 3
    assert max(Counter(row["messages"][0]["content"].rpartition("\n\n")[2] for row in absent).values()) == 1
    for row in absent:
        beside, of = (names["abc".index(parent[0])] for parent in row["made"]["parents"])
        shown, _, question = row["messages"][0]["content"].rpartition("\n\n")
        assert shown == beside != of and question in {one["question"] for one in true}
        german = re.search("[äöüß]|Wie|Was|Wann|Bei", question) is not None
        assert row["messages"][1]["content"] == ("Das steht nicht im Text." if german else "The text does not say.")


def test_a_text_that_says_the_same_in_other_words_answers_too() -> None:
    own, other = Chunk("a", 1, text_of("returns.md")), Chunk("b", 1, "You have 30 days of delivery to send shoes back.")
    one = Kept(Pair("How long?", "They can be sent back for thirty days.", "sent back within 30 days"), own)
    assert not does_not_answer(own, one) and not does_not_answer(other, one)
    assert does_not_answer(Chunk("c", 1, text_of("comet.txt")), one)


def test_the_command_makes_rows_that_data_check_takes_from_a_replay(tmp_path: Path, mlx_model: Path) -> None:
    rows = [row for row in PAIRS if row["founded"] and row["document"] == "returns.md"]
    text = "\n".join(pair(row["question"], row["answer"], row["quote"]) for row in rows)
    answers = tiny.write_jsonl(tmp_path / "answers.jsonl", [{"id": "returns.md#1", "text": text, "finish": "stop"}])
    words = ("make", "from-documents", DOCUMENTS / "returns.md", "--per-chunk", "6", "--engine", f"replay:{answers}")
    done = tiny.done(*words, "--out", tmp_path / "made")
    assert "6 of 6 rows kept" in done.stdout and "estimate" in done.stderr
    report = json.loads(tiny.done("data", "check", "--model", mlx_model, "--data", tmp_path / "made", "--json").stdout)
    assert not [one for one in report["findings"] if one["severity"] == "error"]
    dry = tiny.done(*words, "--out", tmp_path / "dry", "--dry-run").stdout
    assert "Unworn shoes" in dry and "about 1 requests" in dry and not (tmp_path / "dry").exists()
    idle = tiny.mlxtune(*words, "--unanswerable", "0.1", "--out", tmp_path / "idle")
    tiny.one_clear_line(idle, "--unanswerable has no effect without --with-text")
