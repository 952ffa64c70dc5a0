"""What an answer says that its text does not, and how it is said that a text does not say something."""

from __future__ import annotations

from pathlib import Path

import made
import pytest
from made import Scripted

from mlxtune.make.documents.absent import Kept, answer_for, drawn
from mlxtune.make.documents.asking import Pair
from mlxtune.make.documents.chunks import Chunk
from mlxtune.make.documents.grounding import unfounded
from mlxtune.make.documents.maker import FromDocuments, Wanted
from mlxtune.make.guard import Guard

SHOP = "Unworn goods go back for 30 days; a refund takes one day. Ask Mrs. Okafor at the office for a box of a dozen."
# (What an answer was made from, a true answer in other words, an invented one)
FIRST_WORDS = [
    ("Покупатель возвращает товар за 30 дней.", "Клиент может вернуть товар за 30 дней.", "Это решает Анна Петрова."),
    ("Na zwrot towaru jest 30 dni.", "Masz na to w sumie 30 dni.", "Masz na to 14 dni."),
    ("Varor kan skickas tillbaka i 30 dagar.", "Returen måste göras i 30 dagar.", "Det sköts av Anna Holm."),
    ("Ürünler 30 gün içinde geri verilir.", "İade süresi toplam 30 gün olur.", "Bunu yalnız Ayşe yapar."),
    ("Der Schlüssel liegt im Keller.", "Neue Schlüssel liegen im Keller.", "Peter Müller hat den Schlüssel."),
    (SHOP, "Contact the office for a box.", "Contact Paul Weber for a box of goods."),
    (SHOP, "Contact Mrs. Okafor at the office.", "Mrs. Adeyemi at the office has a box."),
    (SHOP, "Returns are accepted for 30 days.", "Paul Weber takes goods back for 30 days."),
    (SHOP, "Up to 30 days are left for that.", "Up to 40 days are left for that."),
    (SHOP, "You have 30 days.", "You have 40 days."),
    (SHOP, "It takes 1 day for a refund.", "It takes 3 days for a refund."),
    (SHOP, "There are 12 in a box of goods.", "There are two dozen in a box of goods."),
]


@pytest.mark.parametrize(("chunk", "true", "invented"), FIRST_WORDS)
def test_the_first_word_of_a_sentence_is_no_name_by_its_capital_letter(chunk: str, true: str, invented: str) -> None:
    assert unfounded("", true, chunk) is None
    assert unfounded("", invented, chunk) is not None


def test_who_it_is_is_a_name_as_the_first_word() -> None:
    assert unfounded("Who has a box of goods?", "Weber has a box of goods at the office.", SHOP) is not None
    assert unfounded("Who has a box of goods?", "Ask the office for a box of goods.", SHOP) is None


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("كم يستغرق إرجاع الطلب؟", "النص لا يذكر ذلك."),
        ("वापसी में कितने दिन लगते हैं?", "पाठ में यह नहीं बताया गया है।"),
        ("การคืนสินค้าใช้เวลากี่วัน", "ข้อความไม่ได้ระบุไว้"),
        ("Do kolika dnů se vrací zboží a kde je řád?", "Text to neuvádí."),
        ("Mất bao nhiêu ngày để trả hàng?", "Văn bản không nói điều đó."),
        ("واپسی میں کتنے دن لگتے ہیں؟", ""),
        ("Hány napig küldhető vissza?", "A szöveg ezt nem említi."),
        ("Okafor?", "The text does not say."),  # its chunk tells
    ],
)
def test_that_the_text_does_not_say_it_is_said_in_the_language_of_the_question(
    question: str, said: str, tmp_path: Path
) -> None:
    own = Chunk("a", 1, SHOP if question == "Okafor?" else question)
    one = Kept(Pair(question, "5 000 000", "q"), own)
    assert answer_for(one) == said
    assert len(drawn([one], [Chunk("b", 1, "It is 7.")], 1, 0)) == bool(said)
    with made.making(tmp_path / "made", Scripted(lambda _: "")) as making:
        work = FromDocuments(making, [own], Guard(), Wanted(per_chunk=1, unanswerable=0.5))
        work.kept.append(one)
        assert len(work.notes()) == (not said)
