"""Drawings of a page: where points stand, what stays of long curves, and what is said of them in words."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import page_readers
import pytest

from mlxtune.report.drawing.figure import BOTTOM, LEFT, RIGHT, TOP, Mark
from mlxtune.report.drawing.plots import Interval, Line, curves, histogram, intervals
from mlxtune.report.drawing.scale import fitted, written
from mlxtune.report.drawing.thinning import Point, thinned

HALF_A_PIXEL = 0.5


def drawing(made: str) -> ElementTree.Element:
    (found,) = page_readers.drawings(made)
    return found


def ticks(made: str, along: str) -> list[tuple[float, float]]:
    """(place, value) of the numbers written beside an axis, along "x" or "y"."""
    out = []
    for group in drawing(made).iter("g"):
        line, label = group.find("path"), group.find("text")
        assert line is not None and label is not None
        across = re.fullmatch(r"M([\d.]+) [\d.]+V[\d.]+", line.get("d", ""))
        up = re.fullmatch(r"M[\d.]+ ([\d.]+)H[\d.]+", line.get("d", ""))
        found = across if along == "x" else up
        if found:
            out.append((float(found[1]), float((label.text or "").replace(",", ""))))
    return out


def inverted(made: str, along: str, log: bool = False) -> tuple[float, float]:
    """(factor, term) by which a place is a value, from the first and last number of the axis; of its logarithm."""
    (first, low), *_, (last, high) = ticks(made, along)
    if log:
        low, high = math.log10(low), math.log10(high)
    factor = (high - low) / (last - first)
    return factor, low - factor * first


def paths(made: str, class_: str) -> list[list[tuple[float, float]]]:
    """The pieces of the lines of a class, as places."""
    out = []
    for path in drawing(made).iter("path"):
        if class_ in path.get("class", "").split():
            for piece in re.split("(?=M)", path.get("d", ""))[1:]:
                numbers = [float(one) for one in re.findall(r"-?[\d.]+", piece.removesuffix("h0"))]
                out.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return out


def drawn(made: str, class_: str, log: bool = False) -> list[list[tuple[float, float]]]:
    """The same as values, read back by the numbers beside the axes."""
    (by_x, from_x), (by_y, from_y) = inverted(made, "x"), inverted(made, "y", log)
    out = []
    for piece in paths(made, class_):
        values = [(x * by_x + from_x, y * by_y + from_y) for x, y in piece]
        out.append([(x, 10**y if log else y) for x, y in values])
    return out


def losses(count: int, seed: int = 3) -> list[Point]:
    rng = random.Random(seed)
    return [(step, 3 * math.exp(-step / count * 3) + rng.random() / 4) for step in range(1, count + 1)]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("count", [2, 47, 900])
def test_points_of_a_curve_stand_within_half_a_pixel_of_where_the_axes_say(count: int, log: bool) -> None:
    points = losses(count)
    made = curves("Loss", "step", "nats", [Line("training", points)], log=log)
    (piece,) = drawn(made, "line", log)
    by_x, by_y = abs(inverted(made, "x")[0]), abs(inverted(made, "y", log)[0])
    assert len(piece) == count
    for (x, y), (step, loss) in zip(piece, points, strict=True):
        assert loss is not None
        assert abs(x - step) <= HALF_A_PIXEL * by_x
        off = abs(math.log10(y) - math.log10(loss)) if log else abs(y - loss)
        assert off <= HALF_A_PIXEL * by_y


def test_what_is_no_number_is_a_gap_and_a_point_alone_is_a_dot() -> None:
    points: list[Point] = [(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, math.nan), (6, 1.0), (7, 2.0), (8, math.inf)]
    made = curves("Loss", "step", "nats", [Line("training", points)])
    pieces = [[round(x) for x, _ in piece] for piece in drawn(made, "line")]
    assert pieces == [[1, 2], [4], [6, 7]]
    assert "3 points are no numbers" in (drawing(made).findtext("desc") or "")


@pytest.mark.parametrize("points", [[], [(1, None)], [(1, math.nan), (2, None)]])
def test_a_curve_without_a_number_is_a_drawing_that_says_so(points: list[Point]) -> None:
    made = curves("Loss", "step", "nats", [Line("training", points)])
    assert paths(made, "line") == []
    assert "no number that could be drawn" in [text.text for text in drawing(made).iter("text")]


def test_what_is_not_above_zero_is_a_gap_on_a_logarithmic_scale() -> None:
    made = curves("Loss", "step", "nats", [Line("training", [(1, 1.0), (2, 0.0), (3, -1.0), (4, 10.0)])], log=True)
    assert [[round(x) for x, _ in piece] for piece in drawn(made, "line", log=True)] == [[1], [4]]


@pytest.mark.parametrize("largest", [5e-324, 1e-12, 0.0, 1.0, 1e9, 1e300, 1.7e308])
@pytest.mark.parametrize("sign", [1, -1])
def test_all_sizes_of_numbers_stand_inside_the_axes(largest: float, sign: int) -> None:
    points: list[Point] = [(0, sign * largest), (1, sign * largest / 3), (2, -sign * largest)]
    made = curves("Loss", "step", "nats", [Line("training", points)], [Mark("limit", None, largest)])
    for piece in paths(made, "line"):
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in piece)
    assert 2 <= len(ticks(made, "y")) <= 12


@pytest.mark.parametrize("log", [False, True])
def test_no_numbers_are_too_strange_to_be_drawn(log: bool) -> None:
    strange = [
        0.0,
        -0.0,
        5e-324,
        -5e-324,
        1e-300,
        1e308,
        -1.7e308,
        1.0,
        1 + 2**-52,
        -1.0,
        1e-9,
        1e17,
        math.inf,
        math.nan,
    ]
    rng = random.Random(5)
    for _ in range(300):
        points: list[Point] = [(rng.choice(strange), rng.choice([*strange, None])) for _ in range(rng.randrange(4))]
        made = curves("Loss", "step", "nats", [Line("training", points)], [Mark("m", None, rng.choice(strange))], log)
        places = [one.get(name, "") for one in drawing(made).iter() for name in ("d", "x", "y", "cx", "cy")]
        assert not [place for place in places if "nan" in place or "inf" in place]
        for piece in paths(made, "line"):
            assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in piece), points


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 1.0, 1.5], ["0.5", "1.0", "1.5"]),
        ([0, 20_000, 40_000], ["0", "20,000", "40,000"]),
        ([0.0, 5e-5, 1e-4], ["0", "0.5e-4", "1.0e-4"]),
        ([2e9, 4e9], ["2e9", "4e9"]),
        ([25_652_000, 25_654_000], ["2.5652e7", "2.5654e7"]),
        ([0.05, 0.1], ["0.05", "0.10"]),
        ([-0.2, 0.0, 0.2], ["-0.2", "0.0", "0.2"]),
    ],
)
def test_the_numbers_of_an_axis_have_as_many_decimals_as_tell_them_apart(
    values: list[float], expected: list[str]
) -> None:
    assert written(values) == expected


def test_numbers_of_an_axis_are_round_and_distinct() -> None:
    rng = random.Random(1)
    for _ in range(300):
        low = rng.uniform(-1, 1) * 10 ** rng.uniform(-6, 8)
        scale = fitted([low, low + 10 ** rng.uniform(-4, 6) * max(1, abs(low) * 1e-4)], 0, 100)
        found = scale.ticks(5)
        assert 2 <= len(found) <= 12
        assert len({label for _, label in found}) == len(found), found
        assert all(0 <= scale.place(value) <= 100 for value, _ in found)


def test_a_short_curve_is_drawn_whole() -> None:
    points = losses(1_000)
    assert thinned(points) == points


@pytest.mark.parametrize("count", [1_001, 5_000, 100_000])
def test_spikes_survive_thinning_wherever_they_are(count: int) -> None:
    points = losses(count)
    rng = random.Random(2)
    places = sorted({*rng.sample(range(1, count - 1), 5), 1, count - 2})
    spikes: list[Point] = [(points[at][0], 50.0 + at if at % 2 else -50.0 - at) for at in places]
    for at, spike in zip(places, spikes, strict=True):
        points[at] = spike
    kept = thinned(points)
    assert set(spikes) <= set(kept) <= set(points)
    assert len(kept) <= 1_000 and kept[0] == points[0] and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_gaps_survive_thinning_and_so_does_a_spike_between_them() -> None:
    points = losses(30_000)
    for at in range(10_000, 12_000):
        points[at] = (points[at][0], math.nan if at % 2 else None)
    points[11_000] = (points[11_000][0], 99.0)
    kept = thinned(points)
    assert len(kept) <= 1_000 and points[11_000] in kept
    gaps = [x for x, y in kept if y is None or not math.isfinite(y)]
    assert gaps and all(10_001 <= x <= 12_000 for x in gaps) and gaps[-1] > 11_500


@pytest.mark.parametrize("most", [5, 6, 7, 100])
def test_no_more_points_are_kept_than_asked_for(most: int) -> None:
    plain = losses(4_000)
    gappy: list[Point] = [(x, None if x % 7 == 0 else y) for x, y in plain]
    for points in (plain, gappy):
        kept = thinned(points, most)
        assert 2 < len(kept) <= most and kept[0] == points[0] and kept[-1] == points[-1]


def test_marks_stand_at_their_values_with_their_names() -> None:
    marks = [Mark("base", None, 2.5), Mark("went on", 30, None), Mark("best", 40, 1.0)]
    made = curves("Loss", "step", "nats", [Line("training", losses(50))], marks)
    root = drawing(made)
    (by_x, from_x), (by_y, from_y) = inverted(made, "x"), inverted(made, "y")
    lines = [path.get("d", "") for path in root.iter("path") if path.get("class") == "mark"]
    base = re.fullmatch(r"M[\d.]+ ([\d.]+)H[\d.]+", lines[0])
    went_on = re.fullmatch(r"M([\d.]+) [\d.]+V[\d.]+", lines[1])
    assert base and float(base[1]) * by_y + from_y == pytest.approx(2.5, abs=0.02)
    assert went_on and float(went_on[1]) * by_x + from_x == pytest.approx(30, abs=0.2)
    (ring,) = root.iter("circle")
    assert float(ring.get("cx", "")) * by_x + from_x == pytest.approx(40, abs=0.2)
    assert float(ring.get("cy", "")) * by_y + from_y == pytest.approx(1.0, abs=0.02)
    assert {"base", "went on", "best"} <= {text.text for text in root.iter("text")}


def test_a_legend_tells_lines_apart_by_how_they_are_drawn() -> None:
    lines = [
        Line("one", [(1, 1), (2, 2)]),
        Line("two", [(1, 2), (2, 3)], "dashed", 1),
        Line("three", [(1, 1)], "points", 2),
    ]
    made = curves("Loss", "step", "nats", lines)
    (legend,) = re.findall('<ul class="legend">.*?</ul>', made)
    entries = re.findall('<path d="[^"]*" class="([^"]*)"></path></svg>([^<]*)</li>', legend)
    assert entries == [("line solid curve0", "one"), ("line dashed curve1", "two"), ("line points curve2", "three")]
    assert [path.get("class") for path in drawing(made).iter("path") if "line" in path.get("class", "")] == [
        class_ for class_, _ in entries
    ]


def test_a_drawing_has_a_title_and_says_in_words_what_it_shows() -> None:
    made = curves("Loss", "step", "nats", [Line("training", [(1, 3.25), (2, 0.5), (3, 1.5)])], [Mark("best", 2, 0.5)])
    root = drawing(made)
    assert (root.get("role"), root.findtext("title")) == ("img", "Loss")
    said = root.findtext("desc") or ""
    assert "training: 3.25 at step 1, 1.5 at 3; lowest 0.5 at 2, highest 3.25 at 1." in said
    assert "best: step 2, 0.5." in said
    assert "<figcaption>Loss</figcaption>" in made


BINS = [(0.0, 10.0, 3), (10.0, 20.0, 9), (20.0, 30.0, 0), (30.0, 40.0, 1)]


def test_bars_are_as_high_as_their_counts() -> None:
    made = histogram("Lengths", "tokens", BINS, [Mark("max_tokens", 35.0, None)])
    (by_x, from_x), (by_y, from_y) = inverted(made, "x"), inverted(made, "y")
    found: list[Sequence[float]] = []
    for bar in drawing(made).iter("rect"):
        x, y, width, height = (float(bar.get(name, "")) for name in ("x", "y", "width", "height"))
        assert y + height == pytest.approx(BOTTOM, abs=0.11)
        found.append((x * by_x + from_x, (x + width) * by_x + from_x, y * by_y + from_y))
    assert [pytest.approx(one, abs=0.1) for one in found] == BINS
    assert "13 in 4 bins. Most, 9, are from 10 to 20. max_tokens: tokens 35." in (drawing(made).findtext("desc") or "")


def test_a_histogram_of_nothing_is_drawn() -> None:
    assert "0 in 0 bins" in histogram("Lengths", "tokens", [])


def test_intervals_stand_around_zero() -> None:
    rows = [Interval("json", -0.1, 0.2, 0.4), Interval("<b>", 0.1, 0.2, 0.3, "12 of 24")]
    made = intervals("Checks", "difference", rows)
    by, start = inverted(made, "x")
    bars = [path.get("d", "") for path in drawing(made).iter("path") if path.get("class") == "line curve0"]
    ends = [[float(one) * by + start for one in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", bar).groups()] for bar in bars]  # type: ignore[union-attr]
    assert ends == [pytest.approx([-0.1, 0.4], abs=0.005), pytest.approx([0.1, 0.3], abs=0.005)]
    texts = [text.text for text in drawing(made).iter("text")]
    assert {"json", "<b>", "+0.2 (-0.1 to +0.4)", "12 of 24"} <= set(texts)
    zero = next(path.get("d", "") for path in drawing(made).iter("path") if path.get("class") == "frame")
    assert float(re.findall(r"M([\d.]+)", zero)[0]) * by + start == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize("text", ["</svg><script>x</script>", "\x1b]0;x\x07", "a" * 500, "\ud800\ufffe"])
def test_names_in_a_drawing_are_texts(text: str) -> None:
    lines, marks = [Line(text, [(1, 1.0), (2, 2.0)])], [Mark(text, 1, 1)]
    made = curves(text, text, text, lines, marks) + histogram(text, text, BINS, marks)
    made += intervals(text, text, [Interval(text, 0, 1, 2, text)])
    plain = curves("x", "x", "x", [Line("x", [(1, 1.0), (2, 2.0)])], [Mark("x", 1, 1)])
    assert page_readers.read(made).tags[: len(page_readers.read(plain).tags)] == page_readers.read(plain).tags
    assert "<script" not in made and "\x1b" not in made
    assert len(page_readers.drawings(made)) == 3
