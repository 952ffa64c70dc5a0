"""What `data check` takes for a secret is hidden on a page, whole, and nothing else is."""

from __future__ import annotations

import time

import pytest

from mlxtune.data.survey.lint import SECRETS
from mlxtune.report.secrets import masked

BODY = "MIIEowIBAAKCAQEAx4UbaDzY5xjW6hc9jwN0mX33XpTDVW+/Qw9sXkFqFh0NcBqL"
BEGIN, END = "-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("AKIAABCDEFGHIJKLMNOP", "AKIA…"),
        ("ghp_" + "a1" * 20, "ghp_…"),  # longer than the pattern: no rest stays
        ("github_pat_" + "a1" * 20, "gith…"),
        ("sk-proj-" + "aB3_" * 8, "sk-p…"),
        ("AIza" + "a1-_x" * 8, "AIza…"),
        ("xoxb-1234567890-abc", "xoxb…"),
        ("hf_" + "aB3" * 12, "hf_a…"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4", "eyJh…"),
        ('password = "correct-horse"', 'password = "…"'),
        ("API_KEY: 'a1b2c3d4e5'", "API_KEY: '…'"),
        ('{"password": "correct-horse"}', '{"password": "…"}'),  # as JSON writes it
        (r"{\"password\": \"hunter2hunter2\"}", r"{\"password\": \"…\"}"),  # a string in it: arguments of a tool
        (r"{\\\"passwd\\\":\\\"correct-horse\\\"}", r"{\\\"passwd\\\":\\\"…\\\"}"),
        (f"{BEGIN}\n{BODY}\n{BODY}\n{END}", f"{BEGIN}…{END}"),
        (f"{BEGIN}\\n{BODY}\\n{BODY[:9]}", f"{BEGIN}…"),  # inside a JSON string, and cut
    ],
)
def test_a_secret_is_found_by_the_check_and_hidden_on_the_page(secret: str, shown: str) -> None:
    text = f"Take <{secret}"
    assert SECRETS.search(text)
    assert masked(text) == f"Take <{shown}"
    assert masked(masked(text)) == masked(text)


def test_what_stands_around_secrets_stays() -> None:
    text = f"One AKIAABCDEFGHIJKLMNOP, two {BEGIN}\n{BODY}\n{END} and hf_{'aB3' * 12}."
    assert masked(text) == f"One AKIA…, two {BEGIN}…{END} and hf_a…."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The password is on the door.",
        "task-force and sk-short",
        f"A key begins with {BEGIN} and then letters.",
        "eyJ",
        r"{\"password\": \"hunter2\"}",  # too short, as it is without the backslashes
    ],
)
def test_a_text_without_a_secret_stays_as_it_is(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize(
    "text", ["-eyJ", "password=", "sk-", BEGIN, "-----BEGIN ", "xoxb-", "password='", "password\\", f"{BEGIN}{END}"]
)
def test_a_long_text_costs_no_more_than_its_length(text: str) -> None:
    """Searched once more from each beginning it would take half a minute."""
    began = time.process_time()
    masked(text * (200_000 // len(text)))
    assert time.process_time() - began < 1
