"""Runs whose examples share beginnings: what they compute is said, they resume, and older runs are told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from test_ranks import Group
from training import SETTINGS, losses, tune

from mlxtune.bench import children, parts
from mlxtune.bench.figures import Measured
from mlxtune.cli.bench import _print_parts
from mlxtune.compute import counted, fast_ways, prefix
from mlxtune.compute.prefix import forest_of_batch, is_simple
from mlxtune.config import resolve
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import DEALT, Plan, collate
from mlxtune.errors import UserError
from mlxtune.train import preparation
from mlxtune.train.identity import Identity, _flat
from mlxtune.train.ranks import Ranks
from mlxtune.train.run_data import read_data

EXPANDED = ("data.expand_turns=all", "train.batch_rows=4", "train.accumulate=1", "train.steps=4", "train.eval_every=0")
FLAT = ("train.schedule=constant", "train.warmup_steps=0")  # so that fewer steps begin as more do
ALL_AT_ONCE = ("train.batch_rows=8", "train.steps=2")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations of four turns each, and two held out."""
    folder = tmp_path_factory.mktemp("talks")
    said = [row["messages"] for row in tiny.conversations(40)]
    rows = [{"messages": [message for pair in said[at : at + 4] for message in pair]} for at in range(0, 40, 4)]
    tiny.write_jsonl(folder / "train.jsonl", rows[:8])
    tiny.write_jsonl(folder / "valid.jsonl", rows[8:])
    return folder


def plan_of(model: Path, data: Path, *settings: str) -> Plan:
    config = resolve.load(None, (*SETTINGS, *settings), {"model.path": str(model), "data.path": str(data)})
    found, config = read_data(config)
    return preparation.attached(config, found, read=False).plan


def test_a_run_says_what_it_computed_and_goes_on_with_the_same_bits(
    hf_model: Path, talks: Path, tmp_path: Path
) -> None:
    settings = (*EXPANDED, *FLAT)
    whole = tune(hf_model, talks, tmp_path / "whole", *settings)
    plan = plan_of(hf_model, talks, *settings)
    steps = [event for event in whole if event["kind"] == "train"]
    for event in steps:
        batches = plan.step(event["step"])
        assert event["tokens"] == sum(batch.tokens for batch in batches)
        assert event["computed_tokens"] == sum(forest_of_batch(batch, 0).computed for batch in batches)
        assert event["computed_tokens"] < 0.7 * event["tokens"]
        assert not any(is_simple(forest_of_batch(batch, 0)) for batch in batches)
    tune(hf_model, talks, tmp_path / "again", *settings, "train.steps=2")
    tune(hf_model, talks, tmp_path / "again", *settings, resume=True, anyway=True)
    one, other = tmp_path / "whole", tmp_path / "again"  # which evaluated once more, after step 2
    assert losses(one).items() <= losses(other).items()
    assert (one / "adapters.safetensors").read_bytes() == (other / "adapters.safetensors").read_bytes()


def test_what_is_shared_changes_no_loss(hf_model: Path, talks: Path, tmp_path: Path) -> None:
    """Eight conversations in each step, so that both runs have the same rows in it."""
    shared = tune(hf_model, talks, tmp_path / "shared", *EXPANDED, *ALL_AT_ONCE)
    apart = tune(hf_model, talks, tmp_path / "apart", *EXPANDED, *ALL_AT_ONCE, "fast.prefix=off")
    computed = [[e["computed_tokens"] for e in run if e["kind"] == "train"] for run in (shared, apart)]
    assert all(one < 0.7 * other for one, other in zip(*computed, strict=True))
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "apart"), rel=1e-5)


@pytest.mark.parametrize(
    "setting", ["lora.dropout=0.1", "train.neftune_alpha=5", "fast.prefix=off", "data.group_by_prefix=false"]
)
def test_where_nothing_is_shared_rows_are_dealt_by_length_alone(hf_model: Path, talks: Path, setting: str) -> None:
    plan, apart = (plan_of(hf_model, talks, *EXPANDED, *more) for more in ((), (setting,)))
    assert plan.shares and plan.dealt == DEALT and len(plan.step(1)) <= 2
    assert not apart.shares and apart.dealt == "" and len(apart.step(1)) == 4


def test_why_turns_of_a_conversation_are_not_computed_once_is_said(
    hf_model: Path, talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows begin with few tokens in common; rows of one example each then need no word."""
    monkeypatch.setattr(prefix, "WORTH_SAYING", 99)
    examples = plan_of(hf_model, talks, *EXPANDED).examples
    config = resolve.load(None, ("lora.dropout=0.1",))
    reason = "examples of one row begin alike, but with lora.dropout each row must see noise of its own"
    assert fast_ways.shared_prefix(None, examples, config) == (None, reason)  # type: ignore[arg-type]
    assert fast_ways.shared_prefix(None, list(examples), config) == (None, "")  # type: ignore[arg-type]


def test_a_dry_run_says_what_will_be_computed(hf_model: Path, talks: Path) -> None:
    settings = [word for setting in (*SETTINGS, *EXPANDED) for word in ("--set", setting)]
    result = tiny.mlxtune("train", "--model", hf_model, "--data", talks, "--dry-run", *settings)
    assert result.returncode == 0, result.stderr
    plan = plan_of(hf_model, talks, *EXPANDED)
    epoch = counted.first_epoch(plan, 0)
    assert epoch.exact and epoch.tokens == int(plan.examples.lengths.sum())
    once = int(plan.examples.of_rows("once").sum())  # type: ignore[attr-defined]
    line = f"tokens computed per epoch: {epoch.computed:,}, {epoch.computed / epoch.tokens:.2f} of the rows' tokens, "
    assert f"{line}{epoch.computed / once:.2f} of those of each conversation rendered once\n" in result.stdout


def test_rows_too_long_for_a_micro_batch_are_counted_with_what_they_repeat(hf_model: Path, talks: Path) -> None:
    plan = plan_of(hf_model, talks, *EXPANDED, "train.batch_rows=null", "train.batch_tokens=64")
    narrow, wide = counted.first_epoch(plan, 0), counted.first_epoch(plan_of(hf_model, talks, *EXPANDED), 0)
    assert narrow.divided == 8 and wide.divided == 0
    assert narrow.computed > 1.2 * wide.computed


def test_of_a_long_epoch_some_micro_batches_are_counted(
    hf_model: Path, talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(hf_model, talks, *EXPANDED, "train.batch_rows=1")
    exact = counted.first_epoch(plan, 0)
    monkeypatch.setattr(counted, "MOST_COUNTED", 4)
    seen: list[int] = []
    monkeypatch.setattr(counted, "collate", lambda *known: (seen.append(1), collate(*known))[1])
    about = counted.first_epoch(plan, 0)
    assert exact.exact and not about.exact and about.tokens == exact.tokens
    assert 2 <= len(seen) <= 4
    assert about.computed == pytest.approx(exact.computed, rel=0.3)


def test_a_run_whose_rows_were_dealt_otherwise_is_not_resumed(tmp_path: Path) -> None:
    """As its checkpoint says that was written before anything was dealt by its beginning."""
    before = Identity(_flat(resolve.Config()), "train", "valid", "model", "mlx")
    with pytest.raises(UserError) as told:
        before.refuse_other(replace(before, dealt=DEALT), tmp_path, anyway=True)
    assert "the version of mlxtune that began it put rows together otherwise (by length alone)" in told.value.message
    assert before.refuse_other(before, tmp_path, anyway=False) == []


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_share_out_what_branches_off_one_trunk_side_by_side(hf_model: Path, talks: Path, size: int) -> None:
    """One micro-batch: each process takes some that follow each other, about as many new tokens."""
    batch = max(plan_of(hf_model, talks, *EXPANDED).step(1), key=lambda batch: len(batch.rows))
    parts = [Ranks(Group(rank, size)).own_batches([batch], 0) for rank in range(size)]
    dealt = [part.rows.tolist() for own in parts for part in own]
    assert [row for rows in dealt for row in rows] == batch.rows.tolist()
    busiest = max(forest_of_batch(part, 0).computed for own in parts for part in own)
    every_nth = max(forest_of_batch(batch.part(slice(rank, None, size)), 0).computed for rank in range(size))
    assert busiest < every_nth


@pytest.mark.parametrize("size", [2, 3, 7])
def test_each_example_is_some_processs_where_the_last_ones_are_equal(size: int) -> None:
    starts = [[1] * 80 + [9], [1] * 80 + [9, 10], [2] * 80 + [9], [2] * 80 + [9, 11], [2] * 80 + [9, 11]]
    examples = [Example([*ids, 8, 8], [0] * len(ids) + [1, 1]) for ids in starts]
    batch = collate(examples, range(5))
    assert not is_simple(forest_of_batch(batch, 0))
    own = [Ranks(Group(rank, size)).own_batches([batch], 0) for rank in range(size)]
    dealt = [part.rows.tolist() for parts in own for part in parts]
    assert [row for rows in dealt for row in rows] == [0, 1, 2, 3, 4], dealt


def test_processes_have_as_much_to_compute_where_micro_batches_share() -> None:
    """Padded, the first has most tokens; computed, it has least."""
    alike = [Example([*[7] * 90, row, 8, 9], [0] * 91 + [1, 1]) for row in range(6)]
    unlike = [Example([row + 20] * 80, [0] * 70 + [1] * 10) for row in range(5)]
    batches = [collate(rows, range(len(rows))) for rows in (alike, unlike[:3], unlike[3:])]
    own = [Ranks(Group(rank, 2)).own_batches(batches, 0) for rank in range(2)]
    assert [[len(batch.rows) for batch in share] for share in own] == [[3], [2, 6]]


def test_bench_throws_each_switch_and_compares_with_the_run_as_configured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head off takes twice as long here; checkpointing, which is on, a quarter less without; one does not fit."""

    def measured(config: resolve.Config, rows: int, who: str) -> Measured:
        if config.fast.prefix == "off":
            raise UserError("out of memory", "Less.")
        seconds = 2.0 if config.fast.head == "off" else 1.0
        if config.train.checkpoint_layers == "none":
            seconds *= 0.75
        return Measured(who, rows, 1, rows * seconds, 1000, 1, 500, 0.0, 10, 1, "cpu")

    monkeypatch.setattr(children, "measure", measured)
    lines: list[str] = []
    config = resolve.load(None, ("train.checkpoint_layers=all",))
    found = parts.measure(config, 8, lines.append)
    settings = [one.setting for one in found]
    assert settings[0] == settings[-1] == "" and len(lines) == len(found)
    assert {"fast.head=off", "fast.prefix=off", "data.group_by_prefix=false"} <= set(settings)
    assert "train.checkpoint_layers=none" in settings
    _print_parts(found)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fast.head=off", "x", "2.00", "x", "1.00", "0.50"] in shown
    assert ["train.checkpoint_layers=none", "x", "0.75", "x", "1.00", "0.50"] in shown
    assert ["fast.prefix=off", "out", "of", "memory"] in shown


def test_every_key_of_the_fast_section_is_a_switch_that_bench_throws() -> None:
    config = resolve.load(None, ("fast.head=off",))
    thrown = dict(parts.switches(config))
    assert {f"fast.{name}" for name in type(config.fast).model_fields} <= {setting.split("=")[0] for setting in thrown}
    assert thrown["fast.head=auto"].fast.head == "auto" and thrown["fast.prefix=off"].fast.prefix == "off"
