"""An option that would do nothing is refused by itself, in words that say beside what it means something."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from mlxtune.api import exporting
from mlxtune.cli.options import Command, Need, OptionFor
from mlxtune.errors import UserError
from mlxtune.ship.artefacts import Artefact


@click.command(cls=Command)
@click.option("--bits", type=click.Choice(["4", "16"]), default="16")
@click.option("--group", type=int, cls=OptionFor, needs=Need("bits", ("4",), "nothing is quantized"))
@click.option("--push")
@click.option(
    "--public", is_flag=True, cls=OptionFor, needs=Need("push", why="nothing is uploaded", hint="Add --push.")
)
@click.option("--no-verify", is_flag=True)
@click.option("--data", cls=OptionFor, needs=Need("no_verify", (False,), hint="Choose."))
@click.option("--deep", is_flag=True, cls=OptionFor, needs=Need("no_verify"))
@click.option("--heat", type=float, default=0.0)
@click.option("--top-p", type=float, default=1.0, cls=OptionFor, needs=Need("heat"))
def command(**given: object) -> None:
    click.echo(given)


def refusal(*words: str) -> str:
    """What the command says to these words; "" when it takes them."""
    error = CliRunner().invoke(command, words).exception
    assert error is None or isinstance(error, UserError), error
    return str(error or "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--group 32", "--group has no effect with --bits 16: nothing is quantized\nIt is for: 4."),
        ("--public", "--public has no effect without --push: nothing is uploaded\nAdd --push."),
        ("--no-verify --data rows", "--data has no effect with --no-verify\nChoose."),
        ("--data rows --no-verify", "--data has no effect with --no-verify\nChoose."),
        ("--deep", "--deep has no effect without --no-verify"),
        ("--top-p 0.5", "--top-p has no effect at --heat 0"),
    ],
)
def test_an_option_beside_which_nothing_fits_is_refused(words: str, said: str) -> None:
    assert refusal(*words.split()) == said


@pytest.mark.parametrize(
    "words", ["", "--bits 4 --group 32", "--public --push me/x", "--data rows", "--top-p 0.5 --heat 1", "--top-p 1.0"]
)
def test_what_fits_and_a_default_said_aloud_are_taken(words: str) -> None:
    assert refusal(*words.split()) == ""


def test_every_word_of_to_is_a_form() -> None:
    forms = [exporting.artefact(word, None, None, ollama=False) for word in exporting.FORMS]
    assert all(isinstance(form, Artefact) for form in forms) and len({type(form) for form in forms}) == len(forms)
