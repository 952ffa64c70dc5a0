"""Damaged files of strangers, given to the commands that read them: one line or a result, and nothing else."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import artefacts
import damage
import mutated_files
import pytest
import warm
from artefacts import KINDS, Command
from mutated_files import Case

SAMPLE = 1  # damaged files of each kind
SEED = 16

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")


@pytest.fixture(scope="module")
def root(hf_model: Path, mlx_model: Path, data: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undamaged files."""
    folder = tmp_path_factory.mktemp("artefacts") / "root"
    for name, source in (("hf", hf_model), ("mlx", mlx_model), ("data", data), ("run", run)):
        shutil.copytree(source, folder / name)
    artefacts.make(folder)
    return folder


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_damaged_file_ends_in_one_line_or_a_result(kind: str, root: Path, tmp_path: Path) -> None:
    """A sample; `python tests/mutated_files.py --count 10000` runs many."""
    listed = list(mutated_files.cases(SAMPLE, [kind], SEED))
    ended = [mutated_files.run(case, root, tmp_path / "case") for case in listed]
    assert len(ended) == SAMPLE
    assert not [f"{one.case}: {one.fault}; {one.done}; {one.command}; {one.said}" for one in ended if one.fault]


def test_an_undamaged_file_of_each_weight_format_is_accepted(root: Path, tmp_path: Path) -> None:
    """Refusals would say nothing otherwise; the script tries every command."""
    for kind in ("gguf", "gguf adapter", "peft", "jsonl"):
        ended = mutated_files.run(Case(kind, 0, -len(KINDS[kind].readers)), root, tmp_path / "case")
        assert (ended.status, ended.fault) == (0, ""), ended


def _took(status: int = 0, said: str = "", out: str = "", peak: int = 0, seconds: float = 0.1) -> warm.Measured:
    return warm.Measured(subprocess.CompletedProcess([], status, out, said), seconds, peak, late=False)


@pytest.mark.parametrize(
    ("took", "changed", "expected"),
    [
        (_took(2, "error: a\n  hint"), [], ""),
        (_took(0, "note: x", "text"), [], ""),
        (_took(1, "Traceback (most"), [], "exit status 1"),
        (_took(0, "Traceback (most"), [], "exit status 0"),
        (_took(-11), [], "exit status -11"),
        (_took(2, "no line"), [], "0 error lines"),
        (_took(2, "error: a\nerror: b"), [], "2 error lines"),
        (_took(2, "error: " + "x" * 2000), [], "1 error lines, the first of 2007"),
        (_took(0, "", "a\x1b[2J"), [], "a control character"),
        (_took(2, "error: \u202e"), [], "a control character"),
        (_took(0), ["/x/secret.txt"], "changed: /x/secret.txt"),
        (_took(0, peak=2 << 30), [], "2048 MiB"),
        (_took(0, seconds=6.0), [], "6.0 seconds"),
        (warm.Measured(subprocess.CompletedProcess([], -9, "", ""), 0.1, 0, late=True), [], "no end within"),
    ],
)
def test_what_is_no_clean_end_is_a_finding(took: warm.Measured, changed: list[str], expected: str) -> None:
    found = mutated_files.fault_of(took, changed)
    assert found.startswith(expected) and bool(found) == bool(expected)


def test_what_a_refusal_leaves_and_what_is_used_in_silence_is_a_finding(tmp_path: Path) -> None:
    command = Command("mlxtune convert {in} {out}", weights=True)
    assert mutated_files.kept(2, command, tmp_path) == ""
    assert mutated_files.kept(0, command, tmp_path) == "nothing was made"
    (tmp_path / "made").mkdir()
    assert mutated_files.kept(0, command, tmp_path) == ""
    assert mutated_files.kept(2, command, tmp_path) == "left: ['made']"
    done = f"{damage.MUST_SAY}bytes: cut"
    assert "without a word" in mutated_files.silent(_took(0), command, done)
    assert mutated_files.silent(_took(0, "note: it is cut"), command, done) == ""
    assert mutated_files.silent(_took(2), command, done) == mutated_files.silent(_took(0), command, "flip") == ""
    (tmp_path / "Modelfile").write_text("FROM ./a.gguf\nFROM evil\n")
    assert "FROM" in mutated_files.wrong_modelfile(tmp_path)
    (tmp_path / "Modelfile").write_text('FROM ./a.gguf\nPARAMETER stop "</s>"\n')
    assert mutated_files.wrong_modelfile(tmp_path) == ""


def test_a_change_beside_the_declared_output_is_seen(tmp_path: Path) -> None:
    for name in ("out", "other/deep"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "other/a").write_text("a")

    def listed() -> dict[str, tuple[object, ...]]:
        return mutated_files.listed([tmp_path], [tmp_path / "out"])

    before = listed()
    (tmp_path / "out/made").write_text("new")
    assert listed() == before
    (tmp_path / "other/deep/new").write_text("new")
    assert listed().keys() - before.keys() == {str(tmp_path / "other/deep/new")}
    (tmp_path / "other/deep/new").unlink()
    (tmp_path / "other/a").write_text("b")
    assert listed() != before


def test_a_case_makes_the_same_damage_again(root: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        (tmp_path / name / "elsewhere").mkdir(parents=True)
        file = shutil.copy(root / "peft/adapter_config.json", tmp_path / name)
        done = damage.damage(Path(file), random.Random("peft 1 2"), tmp_path / "elsewhere")
        found.append((done, Path(file).read_bytes()))
    assert found[0] == found[1] and found[0][1] != (root / "peft/adapter_config.json").read_bytes()
