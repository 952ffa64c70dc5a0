"""Where values come from, what is read as a number, and what every refusal names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import mlxtune, one_clear_line

from mlxtune.config import resolve
from mlxtune.config.preference import OBJECTIVES
from mlxtune.config.yaml_text import parse_yaml
from mlxtune.errors import UserError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(file: Path | None, *settings: str, **flags: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve.load(file, settings, {key.replace("__", "."): value for key, value in flags.items()})
    assert "\n" not in caught.value.message and "\n" not in caught.value.hint
    return caught.value


def test_flags_beat_settings_beat_the_file_beats_the_defaults(write: Any) -> None:
    file = write("train: {lr: 1, seed: 1, clip_norm: 1, accumulate: 2}\n")
    resolved = resolve.load(file, ("train.lr=2", "train.seed=2"), {"train.lr": 3}).train
    assert (resolved.lr, resolved.seed, resolved.accumulate) == (3, 2, 2)
    assert resolved.weight_decay == resolve.Config().train.weight_decay


def test_a_flag_that_was_not_given_changes_nothing(write: Any) -> None:
    resolved = resolve.load(write("model: {path: here}\n"), (), {"model.path": None, "data.path": "there"})
    assert (resolved.model.path, resolved.data.path) == ("here", "there")


def test_the_last_of_two_equal_settings_counts() -> None:
    assert resolve.load(None, ("train.lr=1", "train.lr=2")).train.lr == 2


@pytest.mark.parametrize("text", ["1e-5", "1E-5", ".5", "5", "5.", "+1e-5", "1e3", "1.5e3", ".5e3", ".5e-3", "2e+2"])
def test_every_way_to_write_a_number_is_a_number(text: str, write: Any) -> None:
    assert resolve.load(write(f"train:\n  lr: {text}\n")).train.lr == float(text)
    assert resolve.load(None, (f"train.lr={text}",)).train.lr == float(text)
    assert resolve.parse_yaml(f"-{text.lstrip('+')}", "").value == -float(text)


def test_text_that_is_no_decimal_number_stays_text() -> None:
    """YAML 1.1 reads the second line as truth values, and numbers of base 16, 8, 2 and 60 and with 1_000."""
    texts = "e5 . 1e .e5 1.2.3 5e5x 2025-01-31 q_proj = 08 1:2:x tRue nuLL +.nan"
    texts += " off yes On NO y n 0x1f 0o17 0b11 1:30 -1:30:00.5 1_000"
    for text in texts.split():
        assert resolve.parse_yaml(f"key: {text}", "").value == {"key": text}
    document = resolve.parse_yaml("a: {b: [off, 'on', 0x1f, 2025-01-31, y]}\nc: 1_000\n1:30: 1\n", "")
    assert document.older == {"a.b[0]": "off", "a.b[2]": "0x1f", "c": "1_000"}
    assert document.lines.items() >= {"a": 1, "a.b": 1, "a.b[4]": 1, "c": 2, "1:30": 3}.items()


def test_a_number_that_is_ten_to_some_readers_and_twelve_to_others_is_refused(write: Any) -> None:
    error = refused(write("train:\n  lr: 1\n  steps: 012\n"))
    assert "line 3: 012 can be read in two ways" in error.message and "without the zero" in error.hint
    assert "two ways" in refused(None, "train.steps=-0_7").message
    assert "two ways" in refused(write("data: {columns: {012: prompt}}\n")).message
    assert resolve.load(None, ("model.path='012'",)).model.path == "012"


def test_a_whole_number_in_scientific_notation_is_a_step_count() -> None:
    assert resolve.load(None, ("train.steps=1e3",)).train.steps == 1000
    error = refused(None, "train.steps=1.5")
    assert error.message.startswith("--set train.steps=1.5: train.steps: should be a valid integer")


@pytest.mark.parametrize("key", ["train.lr", "train.steps", "train.save_every", "lora.rank", "lora.ranks.q_proj"])
def test_yes_and_true_are_not_numbers(key: str) -> None:
    for text in ("true", "false"):
        assert refused(None, f"{key}={text}").message.endswith(": should not be true or false")
    for text in ("yes", "off", "1:30", "0x1f"):
        message = refused(None, f"{key}={text}").message
        assert "should be a valid " in message and message.endswith(f", got '{text}'")


def test_what_older_yaml_took_for_a_truth_value_is_text_where_text_is_meant(write: Any) -> None:
    loaded = resolve.load(write("model: {path: on}\ndata: {columns: {no: prompt, 1:30: answer}, order: y}\n"))
    assert loaded.model.path == "on" and loaded.data.order == "y"
    assert loaded.data.columns == {"no": "prompt", "1:30": "answer"}
    # Where true or false is meant, nothing else can be: old configurations keep their meaning.
    for text, truth in (("yes", True), ("off", False), ("true", True), ("No", False)):
        assert resolve.load(None, (f"data.group_by_prefix={text}",)).data.group_by_prefix is truth


def test_yes_for_a_key_that_takes_words_names_them() -> None:
    assert refused(None, "train.on_oom=yes").message.endswith("train.on_oom: should be 'stop' or 'smaller', got 'yes'")
    assert "should be 'error', 'drop' or 'keep'" in refused(None, "data.on_damage=true").message
    assert refused(None, "train.memory_limit=false").hint.endswith("off: any.")


def test_off_is_a_word_for_the_key_that_knows_it(write: Any) -> None:
    assert resolve.load(write("fast:\n  head: off\n")).fast.head == "off"
    words = ("fast.prefix=off", "train.memory_limit=off", "train.keep_awake=off", "data.cache=off")
    loaded = resolve.load(None, words)
    found = (loaded.fast.prefix, loaded.train.memory_limit, loaded.train.keep_awake, loaded.data.cache)
    assert found == ("off",) * 4
    assert refused(None, "fast.head=on").message.endswith("fast.head: should be 'auto' or 'off', got 'on'")


def test_a_chat_template_never_gets_off_for_false(write: Any) -> None:
    """Any text but the empty one is true to a template: `enable_thinking: off` would turn it on."""
    file = write("data:\n  template_kwargs:\n    thinking: off\n")
    error = refused(file)
    assert error.message.startswith(f"{file} line 3: data.template_kwargs.thinking: off is a text")
    assert error.hint == "Write false; or 'off' in quotes, if the text is meant."
    for setting, meant in (("={on: {a: [Yes]}}", "true"), (".a=[1:30]", "a decimal number"), (".a=0x1f", "a decimal")):
        assert f"Write {meant}" in refused(None, f"data.template_kwargs{setting}").hint
    assert "line 1: data.template_kwargs.a[0]" in refused(write("data: {template_kwargs: {a: [1_000]}}\n")).message
    loaded = resolve.load(write("data: {template_kwargs: {a: 'off', thinking: false, on: 2, day: 2025-01-31}}\n"))
    assert loaded.data.template_kwargs == {"a": "off", "thinking": False, "on": 2, "day": "2025-01-31"}


def test_an_unknown_key_names_file_line_and_nearest_neighbour(write: Any) -> None:
    file = write("# a comment\ntrain:\n  lr: 1e-4\n  warmup_step: 3\n")
    error = refused(file)
    assert error.message == f"{file} line 4: unknown key train.warmup_step"
    assert error.hint == "Did you mean train.warmup_steps?"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("tran.lr", "train"),
        ("train.rank", "lora.rank"),
        ("train.learning_rate", "train.lr"),
        ("lora.lora_alpha", "lora.alpha"),
        ("data.max_length", "data.max_tokens"),
    ],
)
def test_the_nearest_neighbour_is_what_was_meant(key: str, nearest: str) -> None:
    error = refused(None, f"{key}=1")
    assert error.message.startswith(f"--set {key}=1: unknown key ")
    assert error.hint == f"Did you mean {nearest}?"


def test_a_key_without_its_section_is_shown_where_it_belongs(write: Any) -> None:
    assert refused(write("lr: 1e-4\n")).hint == "Did you mean train.lr?"


def test_a_key_like_no_other_gets_the_list_of_sections(write: Any) -> None:
    for text in ("zzzz: 1\n", "1: 2\n", "null: 3\n"):
        assert refused(write(text)).hint == "Sections: model, data, lora, train, preference, fast."


def test_a_key_set_twice_is_refused_with_both_lines(write: Any) -> None:
    file = write("train:\n  lr: 1\n  seed: 2\n  lr: 3\n")
    assert refused(file).message == f"{file} line 4: train.lr is already set in {file} line 2"
    assert "line 3: train is already set" in refused(write("train:\n  lr: 1\ntrain:\n  seed: 1\n")).message
    file = write("data:\n  sources:\n  - path: a\n    path: b\n")
    assert f"line 4: data.sources[0].path is already set in {file} line 3" in refused(file).message
    error = refused(None, "data.columns={a: b, a: c}")
    assert error.message == "--set data.columns line 1: data.columns.a is already set in --set data.columns line 1"


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "train:\n", "train:\n  # lr: 1\nlora:\n", "train: {}\n"])
def test_an_empty_file_or_section_means_the_defaults(text: str, write: Any) -> None:
    assert resolve.load(write(text)) == resolve.Config()


@pytest.mark.parametrize("value", ["5", "[]", "fast"])
def test_a_section_that_holds_a_value_is_refused(value: str, write: Any) -> None:
    error = refused(write(f"train: {value}\n"))
    assert "line 1: train: expected a section with its keys indented below it, got" in error.message
    assert "train is not a section" in refused(write(f"train: {value}\n"), "train.lr=1").message


def test_a_file_that_is_no_mapping_is_refused(write: Any) -> None:
    assert "expected sections such as `train:`, found list" in refused(write("- train\n")).message


def test_yaml_that_cannot_be_read_names_the_line(write: Any) -> None:
    tab = refused(write("train:\n\tlr: 1\n"))
    assert " line 2: not valid YAML" in tab.message and "indented with spaces alone" in tab.hint
    control = refused(write("train: \x00\n"))
    assert "not valid YAML" in control.message and not control.hint
    assert "not valid YAML" in refused(write(f"train: {{steps: {'9' * 5000}}}\n")).message
    open_bracket = refused(None, "train.lr=[")
    assert open_bracket.message.startswith("--set train.lr line 1: not valid YAML")
    assert "Close each bracket" in open_bracket.hint


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"train: \xff\n")
    assert "not a text file (invalid UTF-8 at byte 7)" in refused(tmp_path / "run.yaml").message


@pytest.mark.parametrize("setting", ["train.lr", "lr=1", "=1", ".lr=1", "train.=1", ""])
def test_a_setting_without_section_key_and_value_is_refused(setting: str) -> None:
    assert "expected section.key=value" in refused(None, setting).message


@pytest.mark.parametrize(
    ("first", "second"), [("train.steps=10", "train.epochs=2"), ("train.batch_rows=4", "train.batch_tokens=512")]
)
def test_two_keys_that_exclude_each_other_are_refused(first: str, second: str, write: Any) -> None:
    names = [text.partition("=")[0].partition(".")[2] for text in (first, second)]
    expected = f"set {names[0]} or {names[1]}, not both"
    for settings in ((first, second), (second, first)):
        assert refused(None, *settings).message == f"--set {second}: train.{names[1]}: {expected}"
    values = [text.partition("=")[2] for text in (first, second)]
    file = write(f"train:\n  {names[1]}: {values[1]}\n  {names[0]}: {values[0]}\n")
    assert refused(file).message == f"{file} line 2: train.{names[1]}: {expected}"


def test_of_two_keys_that_exclude_each_other_the_command_line_replaces_the_files(write: Any) -> None:
    file = write("train: {epochs: 2, batch_rows: 4}\n")
    resolved = resolve.load(file, ("train.steps=10", "train.batch_tokens=512")).train
    assert (resolved.steps, resolved.epochs) == (10, None)
    assert (resolved.batch_rows, resolved.batch_tokens) == (None, 512)
    untouched = resolve.load(file, ("train.steps=null",)).train
    assert (untouched.steps, untouched.epochs) == (None, 2)


@pytest.mark.parametrize("setting", ["lora.layers=0", "lora.layers=-1", "lora.targets=[]"])
def test_an_adapter_on_nothing_is_refused(setting: str) -> None:
    key = setting.partition("=")[0]
    assert refused(None, setting).message == f"--set {setting}: {key}: nothing would be trained"


def test_a_value_of_the_wrong_kind_names_all_that_is_allowed() -> None:
    error = refused(None, "lora.layers=some")
    assert "lora.layers: should be 'all' or a valid integer" in error.message
    assert error.message.endswith("got 'some'")
    assert error.hint == "lora.layers: all blocks, or only the last n."
    assert "'constant', 'linear' or 'cosine'" in refused(None, "train.schedule=slow").message


@pytest.mark.parametrize("setting", ["train.lr=0", "train.lr=.inf", "train.lr=.nan", "train.lr=", "train.steps=0"])
def test_a_value_that_could_not_train_is_refused(setting: str) -> None:
    assert refused(None, setting).message.startswith(f"--set {setting}: train.")


def test_a_refused_flag_is_not_blamed_on_the_file(write: Any) -> None:
    assert refused(write("train: {lr: 1}\n"), train__lr=-1).message == "train.lr: should be greater than 0, got -1"


def test_further_problems_are_counted_by_key() -> None:
    assert refused(None, "lora.layers=x", "lora.rank=0", "train.lr=x").message.endswith(" (and 2 more)")


def test_the_resolved_configuration_writes_every_key(write: Any) -> None:
    tree = resolve.parse_yaml(resolve.Config().to_yaml(), "").value
    written = [*tree, *(f"{section}.{key}" for section, keys in tree.items() for key in keys)]
    assert sorted(written) == sorted(resolve.KEYS)


def test_every_key_says_what_it_means() -> None:
    described = {key: text for key, text in resolve.KEYS.items() if "." in key}
    assert len(described) > 20
    for key, text in described.items():
        assert text.startswith(f"{key}: ") and len(text) > len(key) + 10, key
        assert "None" not in text


def test_a_recipe_is_found_by_name_and_a_file_of_any_name_by_its_path(write: Any) -> None:
    assert resolve.load("quick").train.steps == 60
    assert resolve.find_config(str(write(""))) == write("")
    for name in ("qick", "", "../quick", "~nobody-here/x", "x" * 400):
        with pytest.raises(UserError) as caught:
            resolve.find_config(name)
        assert caught.value.hint == f"Shipped recipes: {', '.join(resolve.recipe_names())}."


def test_an_objective_without_a_recipe_of_its_name_is_reached_by_the_one_that_is_named() -> None:
    others = [name for name in OBJECTIVES if name not in resolve.recipe_names()]
    assert others == ["ipo", "apo", "simpo"]
    for name in others:
        with pytest.raises(UserError) as caught:
            resolve.find_config(name)
        words = f"-c dpo --set preference.loss={name}"
        assert words in caught.value.hint
        assert resolve.load("dpo", (words.rpartition(" ")[2],)).preference.loss == name


def test_the_command_line_refuses_in_one_line_before_it_looks_at_the_model(write: Any) -> None:
    file = write("train:\n  stepz: 3\n")
    result = mlxtune("train", "-c", file, "--model", "nowhere", "--data", "nowhere")
    one_clear_line(result, f"{file} line 2: unknown key train.stepz", "Did you mean train.steps?")


def test_letters_beyond_the_first_65536_are_read_as_json_writes_them_and_halves_of_them_are_refused(
    tmp_path: Path,
) -> None:
    """A half would end a run where its configuration is written, with a traceback."""
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"data": {"template_kwargs": {"🚲": "a 🚲 b"}}}))
    assert "\\ud83d" in file.read_text()
    assert resolve.load(str(file)).data.template_kwargs == {"🚲": "a 🚲 b"}
    file.write_text('data:\n  template_kwargs: {a: "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"line 2: not valid YAML \(half of a character"):
        resolve.load(str(file))


def test_no_text_of_a_written_configuration_begins_a_line() -> None:
    texts = {f"key{letter}": f"a{letter}FORGED {'long ' * 60}{letter}" for letter in "\n\r\x85\u2028\u2029\t"}
    written = resolve.Config.model_validate({"data": {"template_kwargs": texts}}).to_yaml()
    lines = [line.strip() for line in re.split("[\n\r\x85\u2028\u2029]", written)]
    assert not [line for line in lines if line.startswith(("FORGED", "long"))]
    assert resolve.Config.model_validate(parse_yaml(written, "written").value).data.template_kwargs == texts
