"""Every command line of README.md, of the manual (docs/) and of --help does what it says, on a tiny model in a folder
with the names that the lines use: README's in their order, then those of the manual, then those of --help.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import commands
import pytest
import tiny
from test_layers import COMMANDS
from walking import Ended, run_anew

TESTS = Path(__file__).resolve().parent
FIRST = ("model", "run")
# Lines by their beginning that other tests run, since they take long or need what those bring along.
ELSEWHERE = {
    "pip install .": "test_packaging.py::test_the_installed_command_runs",
    "pip install mlxtune-": "test_packaging.py::test_the_installed_command_runs",
    "mlxtune init": "test_init.py::test_the_commands_of_a_new_project_run_as_they_stand",
    "mlxtune demo": "test_use.py::test_the_demo_tells_the_whole_story_on_any_model",
    "mlxtune doctor --test": "test_selftest.py::test_the_command_passes_offline_and_leaves_nothing_behind",
    "mlxtune eval --model model --adapter run --suite data/test.jsonl --judge": "test_judge_command.py::"
    "test_ratings_go_by_criterion_and_by_the_users_own_rubric",
    "mlxtune eval --model model --adapter run --suite data/test.jsonl --min-better": "test_eval_suite.py::"
    "test_a_gate_that_is_not_met_ends_with_status_3",
    "mlxtune eval --model tuned --against http": "test_eval_suite.py::"
    "test_a_server_and_recorded_answers_may_stand_on_either_side",
    "mlxtune eval --model model --adapter run --safety --judge": "test_safety.py::"
    "test_the_result_is_printed_and_likert_is_refused",
    "mlxtune eval --model model --adapter run --benchmark": "test_benchmarks.py::"
    "test_the_command_compares_base_and_tuned_without_a_network_or_torch",
    "mlxtune train -c dpo": "test_preference_runs.py::"
    "test_the_recipe_goes_on_from_an_adapter_and_tells_people_what_it_does",
    "mlxtune make answers": "test_make_answers.py::test_what_is_made_passes_the_check_and_trains",
    "mlxtune make pairs": "test_preference_eval.py::test_what_people_decided_becomes_pairs_that_can_be_read",
    "mlxtune make turns": "test_make_turns.py::"
    "test_the_command_makes_turns_with_recorded_answers_and_refuses_a_base_model",
    "mlxtune make refusals": "test_make_turns.py::test_refusals_are_capped_by_the_set_beside_which_they_will_stand",
    "mlxtune make from-documents": "test_from_documents.py::"
    "test_the_command_makes_rows_that_data_check_takes_from_a_replay",
    "mlxtune make from-template": "test_from_template.py::test_the_command_says_what_is_idle_and_shows_rows_beforehand",
    "mlxtune data curate": "test_curate.py::test_the_command_scores_chooses_and_says_what_became_of_the_rows",
    "mlxtune rate": "test_rate.py::test_a_person_decides_stops_and_goes_on",
    "mlxtune compare": "test_comparison.py::test_three_evaluations_are_ranked_by_the_wins_on_each_prompt",
    "mlxtune report run --evaluation": "test_page_evaluations.py::"
    "test_the_report_command_shows_the_evaluations_that_are_named_and_refuses_others",
    "mlxtune report run --live": "test_live.py::"
    "test_the_command_prints_the_address_and_ends_on_a_signal_the_run_untouched",
    "mlxtune make instructions": "test_make_command.py::"
    "test_a_making_that_is_killed_three_times_goes_on_to_the_same_bytes",
    "mlxtune bench": "test_bench.py::test_the_command_prints_one_json_document",
}
# Lines that no test runs.
NOT_HERE = {
    "git clone": "its address is the reader's",
    "cd mlxtune": "as that of the clone",
    "make demo": "a virtual environment of its own and a model from the package index",
}


def lines() -> list[str]:
    return list(dict.fromkeys([*commands.in_readme(), *in_manual(), *commands.in_help()]))


def in_manual() -> list[str]:
    """The lines of the pages that are not walked through by themselves (walk.py); none that needs more than is here."""
    pages = [commands.DOCS / f"{name}.md" for name in commands.MANUAL if name not in commands.WALKED]
    found = [step for page in pages for step in commands.steps(page) if isinstance(step, commands.Line)]
    return [step.command for step in found if not step.needs]


def runs_here(line: str) -> bool:
    return not line.startswith((*ELSEWHERE, *NOT_HERE))


HERE = [line for line in lines() if runs_here(line)]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """What became of each line. The sources are there under the names that the lines use; nothing else is."""
    folder = tmp_path_factory.mktemp("readme")
    # Tied: the first choices of such a model are clear, so that 16 bits do not turn one of these few.
    tiny.make_model(folder / "Qwen/Qwen2.5-0.5B-Instruct", "qwen2", tie_word_embeddings=True)
    rows = tiny.conversations(16)
    for split, own in (("train", rows[:10]), ("valid", rows[10:13]), ("test", rows[13:])):
        tiny.write_jsonl(folder / "data" / f"{split}.jsonl", own)
    alpaca = [{"instruction": f"Say {index}.", "input": "", "output": f"{index} it is."} for index in range(6)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    pairs = [{"prompt": f"Say {index}.", "chosen": f"{index} it is.", "rejected": "No."} for index in range(6)]
    tiny.write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "gsm8k.csv").write_text("question,answer\nHow much is 1 and 1?,It is 2.\nAnd 2 and 3?,It is 5.\n")
    for name, written in (("lora_config.yaml", "mlx-lm-1-minimal.yaml"), ("qlora.yml", "axolotl-1-qlora.yml")):
        shutil.copy(TESTS / "fixtures" / "imported" / written, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {line: run_anew(line, FIRST) for line in HERE}


@pytest.mark.parametrize("line", HERE)
def test_a_line_ends_well_and_has_made_what_it_names(line: str, ended: dict[str, Ended]) -> None:
    found = ended[line]
    assert found.well, (found.status, found.made, found.err)


def test_a_base_without_an_adapter_is_proven_on_the_text_that_comes_with_mlxtune(ended: dict[str, Ended]) -> None:
    found = ended["mlxtune export --model model --to gguf --out base.gguf"]
    said = " ".join(found.err.split())
    assert "no adapter, so no rows were held out: the proof is on a text that comes with mlxtune" in said
    assert re.search(r"passed: max logit difference \S+, KL \S+, top-1 \S+, on 256 tokens of a text that", found.out)


def test_what_is_not_run_here_is_named_once_each_and_no_command_of_mlxtune_is_run_nowhere() -> None:
    names = [*ELSEWHERE, *NOT_HERE]
    for line in lines():
        matching = [name for name in names if line.startswith(name)]
        assert len(matching) == (0 if line in HERE else 1), (line, matching)
    for name in names:
        assert any(line.startswith(name) for line in lines()), name
    assert all(line.startswith(("mlxtune ", "mlxtune-convert ")) for line in HERE)
    assert not any(name.startswith("mlxtune") for name in NOT_HERE)
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("line", [line for line in lines() if line.startswith("mlxtune ") and line not in HERE])
def test_a_line_that_other_tests_run_has_words_that_its_command_takes(line: str) -> None:
    words = shlex.split(line.partition(">")[0])[1:]
    COMMANDS[(words[0],)].make_context(words[0], words[1:])


def test_the_options_that_readmes_sentences_give_a_command_are_its_own() -> None:
    assert len(commands.spans()) > 5
    for span in commands.spans():
        words = shlex.split(span)[1:]
        path = next(path for path in (tuple(words[:2]), tuple(words[:1])) if path in COMMANDS)
        known = {name for parameter in COMMANDS[path].params for name in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, span


def test_the_lines_are_all_found() -> None:
    """By a count of what begins as one, anywhere in README's blocks."""
    text = commands.README.read_text(encoding="utf-8")
    assert len(re.findall(r"^mlxtune ", text, re.MULTILINE)) == sum(
        line.startswith("mlxtune ") for line in commands.in_readme()
    )
    assert {path[0] for path in COMMANDS if path} <= {line.split()[1] for line in commands.in_help()}
