"""Rows out of Arrow's columns, of Parquet files and of hub datasets: as they were before Arrow typed them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mlxtune.config.schema import SourceSection
from mlxtune.data.dataset import sources
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Bad, Record


def called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A row with one tool and one call of it."""
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
    function = {"name": name, "arguments": arguments}
    return {
        "messages": [
            {"role": "user", "content": f"Ask {name}."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "id": "call00001", "function": function}],
            },
            {"role": "tool", "content": "ok", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [{"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}],
    }


ROWS = [called("bus", {"stop": "harbour"}), called("pool", {"day": "sunday", "lane": "3"})]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def plain(rows: Iterator[Record | Bad]) -> list[dict[str, Any]]:
    found = list(rows)
    assert all(isinstance(row, Record) for row in found), found
    return [{"messages": row.messages, "tools": row.tools} for row in found]  # type: ignore[union-attr]


def written(kind: str, path: Path) -> Path:
    """ROWS as a Parquet file, in one of the ways to put rows of unequal keys into columns."""
    if kind == "structs":  # every struct has the fields of all, most of them null
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "json type":
        datasets.Dataset.from_list(ROWS, on_mixed_types="use_json").to_parquet(path)
    elif kind == "json type alone":
        columns = {key: datasets.List(datasets.Json()) for key in ROWS[0]}
        datasets.Dataset.from_list(ROWS, features=datasets.Features(columns)).to_parquet(path)
    elif kind == "loaded":
        lines = path.with_suffix(".jsonl")
        lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        datasets.load_dataset("json", data_files=str(lines), split="train").to_parquet(path)
    elif kind == "json texts":
        texts = [{key: [json.dumps(item) for item in row[key]] for key in row} for row in ROWS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)
    elif kind == "one json text":
        texts = [{key: json.dumps(row[key]) for key in row} for row in ROWS]  # type: ignore[misc]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)
    elif kind == "maps":
        text, mapped = pyarrow.string(), pyarrow.map_
        function = pyarrow.struct({"name": text, "arguments": mapped(text, text)})
        call = pyarrow.struct({"type": text, "id": text, "function": function})
        message = pyarrow.struct(
            {"role": text, "content": text, "tool_calls": pyarrow.list_(call), "tool_call_id": text}
        )
        schema = pyarrow.struct({"type": text, "properties": mapped(text, pyarrow.struct({"type": text}))})
        described = pyarrow.struct({"name": text, "description": text, "parameters": schema})
        tool = pyarrow.struct({"type": text, "function": described})
        names = pyarrow.schema({"messages": pyarrow.list_(message), "tools": pyarrow.list_(tool)})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS, schema=names), path)
    return path


KINDS = ("structs", "json type", "json type alone", "loaded", "json texts", "one json text")


@pytest.mark.parametrize("kind", [*KINDS, "maps"])
def test_a_parquet_file_gives_the_rows_that_were_written(kind: str, tmp_path: Path) -> None:
    assert plain(formats.read(written(kind, tmp_path / "d.parquet"))) == ROWS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_dataset_gives_the_same_rows_as_its_file(
    kind: str, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, load = written(kind, tmp_path / "d.parquet"), datasets.load_dataset

    def hub(name: str, subset: str | None, streaming: bool) -> Any:
        return load("parquet", data_files={"train": str(path)}, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    (found,) = sources.files_by_split(SourceSection(path="acme/rows"), stream)["train"]
    rows = list(found.read())
    assert plain(iter(rows)) == ROWS
    assert [row.row for row in rows] == [1, 2]


def test_a_null_inside_of_json_stays_while_one_that_arrow_filled_in_goes(tmp_path: Path) -> None:
    given = called("bus", {"stop": None})
    path = tmp_path / "d.parquet"
    columns = {key: datasets.List(datasets.Json()) for key in given}
    datasets.Dataset.from_list([given], features=datasets.Features(columns)).to_parquet(path)
    assert plain(formats.read(path)) == [given]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([given, ROWS[1]]), path)
    first, _ = plain(formats.read(path))
    assert first["messages"][1]["tool_calls"][0]["function"]["arguments"] == {}


def test_broken_json_in_a_column_of_that_type_is_a_bad_row(tmp_path: Path) -> None:
    storage = pyarrow.array(['[{"role": "user"', json.dumps(ROWS[0]["messages"])], pyarrow.string())
    column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), storage)
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "d.parquet")
    bad, good = formats.read(tmp_path / "d.parquet")
    assert isinstance(bad, Bad) and "holds JSON that cannot be read" in bad.reason and bad.row == 1
    assert isinstance(good, Record) and good.messages == ROWS[0]["messages"]


@pytest.mark.parametrize(
    "parameters",
    [
        '{"type": "object", "properties": {"stop": {"type": "string"}}}',
        {"type": "object", "properties": '{"stop": {"type": "string"}}'},
        {"type": "object", "properties": {"stop": '{"type": "string"}'}},
        '{"type": "object", "properties": {"stop": {"type": "string"}, "day": null}}',
    ],
)
def test_json_text_inside_of_a_tool_is_read(parameters: Any, tmp_path: Path) -> None:
    row = called("bus", {"stop": "harbour"})
    row["tools"][0]["function"]["parameters"] = parameters
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    assert plain(formats.read(tmp_path / "d.jsonl")) == [ROWS[0]]


def test_a_schema_that_is_text_but_no_json_is_refused_and_plain_words_in_one_stay(tmp_path: Path) -> None:
    row = called("bus", {"stop": "harbour"})
    row["tools"][0]["function"]["parameters"] = "{stop: string"
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (bad,) = formats.read(tmp_path / "d.jsonl")
    assert isinstance(bad, Bad) and "tools: the parameters of bus must be an object, or JSON text of one" in bad.reason
    row["tools"][0]["function"]["parameters"] = words = {"type": "object", "properties": {"stop": "string"}}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (good,) = plain(formats.read(tmp_path / "d.jsonl"))
    assert good["tools"][0]["function"]["parameters"] == words
