"""Which files of a folder, and which splits of a hub dataset, are trained on, validate, or are told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from mlxtune.config.schema import SourceSection
from mlxtune.data.dataset import sources
from mlxtune.errors import UserError

VALID = ("valid", "validation", "val", "dev", "eval")


def write(folder: Path, *names: str) -> Path:
    for name in names:
        tiny.write_jsonl(folder / name, [{"text": name}])
    return folder


def files(found: dict[str, list[sources.Source]]) -> dict[str, list[str]]:
    return {split: [Path(source.name).name for source in own] for split, own in found.items()}


def find(path: Path) -> dict[str, list[sources.Source]]:
    return sources.files_by_split(SourceSection(path=str(path)))


@pytest.mark.parametrize("name", VALID)
def test_a_validation_file_is_used_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    found = find(write(tmp_path, "train.jsonl", f"{name}.jsonl", "test.jsonl"))
    assert files(found) == {"train": ["train.jsonl"], "valid": [f"{name}.jsonl"], "test": ["test.jsonl"]}
    assert sources.unused(found) == ()


@pytest.mark.parametrize("name", VALID)
def test_shards_of_a_validation_set_are_used_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    shards = [f"{name}-0000{at}-of-00002.jsonl" for at in range(2)]
    assert files(find(write(tmp_path, "train.jsonl", *shards)))["valid"] == shards


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (("val.jsonl", "dev.jsonl"), "val.jsonl", "dev.jsonl"),
        (("valid.jsonl", "validation.jsonl"), "valid.jsonl", "validation.jsonl"),
        (("val-0.jsonl", "dev-0.jsonl", "dev-1.jsonl"), "val-0.jsonl", "dev-0.jsonl"),
        (("val.jsonl", "val-0.jsonl"), "val.jsonl", "val-0.jsonl"),
        (("eval-0.jsonl", "valid.jsonl"), "valid.jsonl", "eval-0.jsonl"),
    ],
)
def test_two_validation_sets_are_refused_by_name(
    names: tuple[str, ...], first: str, second: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"has both {first} and {second}"):
        find(write(tmp_path, "train.jsonl", *names))


def test_a_data_file_that_no_split_uses_is_told_of(tokenizer_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "more.jsonl", "validate.csv", "dataset_info.json", ".hidden.jsonl", "notes.txt")
    found = find(tmp_path)
    assert sources.unused(found) == ("more.jsonl", "validate.csv")
    note = sources.unused_note(SourceSection(path=str(tmp_path)), found)
    assert note == f"{tmp_path}: not used: more.jsonl, validate.csv (read are {', '.join(['train', *VALID, 'test'])})"
    assert sources.unused_note(SourceSection(path="x"), {"train": [sources.Source("x", lambda: iter(()), str)]}) == ""
    command = ("data", "check", "--model", tokenizer_folder, "--data", tmp_path)
    told = tiny.done(*command).stdout
    assert "warning: train: 2 of the data files or splits beside it are not used (more.jsonl, validate.csv)" in told
    (finding,) = [
        one for one in json.loads(tiny.done(*command, "--json").stdout)["findings"] if one["code"] == "unused"
    ]
    assert (finding["count"], finding["rows"]) == (2, ["more.jsonl", "validate.csv"])


def test_a_folder_whose_train_file_is_in_a_folder_of_it_says_which(tmp_path: Path) -> None:
    write(tmp_path / "cache", "other.jsonl")
    write(tmp_path / "data", "train-00000-of-00001.jsonl")
    with pytest.raises(UserError, match="has no train file") as caught:
        find(tmp_path)
    assert f"Its folder data holds one: name {tmp_path / 'data'}." in str(caught.value)


def hub(monkeypatch: pytest.MonkeyPatch, *splits: str) -> None:
    """Any hub dataset has these splits."""
    rows = {split: datasets.Dataset.from_list([{"text": split}]) for split in splits}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(rows))


@pytest.mark.parametrize("name", VALID)
def test_a_hub_datasets_validation_split_is_used_by_any_of_its_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, "train", name, "test", "train_sft")
    found = sources.files_by_split(SourceSection(path="acme/rows"))
    texts: dict[str, Any] = {split: [row.text for row in own[0].read()] for split, own in found.items()}  # type: ignore[union-attr]
    assert texts == {"train": ["train"], "valid": [name], "test": ["test"]}
    assert sources.unused(found) == ("train_sft",)


def test_two_validation_splits_of_a_hub_dataset_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, "train", "validation", "dev")
    with pytest.raises(UserError, match="acme/rows has both validation and dev"):
        sources.files_by_split(SourceSection(path="acme/rows"))
