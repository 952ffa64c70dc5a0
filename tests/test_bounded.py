"""A chat template makes no text that is longer than a limit: it is refused before the text is there."""

from __future__ import annotations

import traceback

import pytest

from mlxtune.data.template import bounded, rendering

LIMIT = 10_000
# What is long only when its pieces are put together.
PIECES = [
    "{% macro many() %}{% for _ in range(99) %}{{ 'a' * 999 }}{% endfor %}{% endmacro %}{{ many() }}",
    "{% for _ in range(99) %}{{ 'a' * 999 }}{% endfor %}",
    "{% set s %}{% for _ in range(99) %}{{ 'a' * 999 }}{% endfor %}{% endset %}",
]
ATTACKS = [
    "{% set ns = namespace(s='ab') %}{% for _ in range(16) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for _ in range(16) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s=['ab']) %}{% for _ in range(16) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% macro twice(n) %}{% if n %}{{ twice(n - 1) * 2 }}{% else %}ab{% endif %}{% endmacro %}{{ twice(14) }}",
    "{{ 'a' * 99999 }}",
    "{{ 99999 * 'a' }}",
    "{{ [1] * 99999 }}",
    "{% set l = ['a' * 999] * 99 %}{{ l }}",
    "{% set l = ['a' * 999] * 99 %}{{ l ~ '' }}",
    "{% set l = ['a' * 999] * 99 %}{{ l|string }}",
    "{% set l = ['a' * 999] * 99 %}{{ l|tojson }}",
    "{% set l = ['a' * 999] * 99 %}{{ l|join }}",
    "{% set l = ['a'] * 99 %}{{ l|join('b' * 999) }}",
    "{% set l = ['a'] * 99 %}{{ ('b' * 999).join(l) }}",
    "{% set l = ['a' * 999] * 99 %}{{ l|map('upper')|join }}",
    "{{ [1]|tojson(indent=99999) }}",
    "{{ 2 ** (2 ** 20) }}",
    "{{ (2 ** 40000) * (2 ** 40000) }}",
    "{{ '%99999d' % 1 }}",
    "{{ '%*d' % (99999, 1) }}",
    "{% set s = 'a' * 999 %}{{ ('%s' * 99) % ((s,) * 99) }}",
    "{{ '%99999d'|format(1) }}",
    "{{ '{:>99999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 99999) }}",
    "{{ ('{0}' * 99).format('a' * 999) }}",
    "{{ 'a'|center(99999) }}",
    "{{ 'a'.ljust(99999) }}",
    "{{ 'a'.rjust(width) if width else 'a'.zfill(99999) }}",
    "{{ ('\\t' * 99).expandtabs(999) }}",
    "{{ ('a\\n' * 99)|indent(999) }}",
    "{{ ('a\\n' * 99)|indent('b' * 999) }}",
    "{{ ('a' * 999)|replace('a', 'b' * 999) }}",
    "{{ ('a' * 999).replace('a', 'b' * 999) }}",
    "{{ ('a' * 999).translate({97: 'b' * 999}) }}",
    "{{ ('a ' * 99)|wordwrap(1, wrapstring='b' * 999) }}",
]


def printed(source: str) -> str:
    compiled = bounded.compile_bounded(source, rendering._compile("").environment)
    return compiled.render(messages=[{"role": "user", "content": "a b"}])


def refused_by(source: str) -> str:
    """The function that asked how long the text will be."""
    with pytest.raises(bounded.TooLong, match=r"^it makes a") as caught:
        printed(source)
    *_, asking, _ = traceback.extract_tb(caught.value.__traceback__)
    return asking.name


@pytest.mark.parametrize("source", ATTACKS)
def test_every_way_to_a_long_text_is_refused_before_it_is_made(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when it is printed: then it is there."""
    monkeypatch.setattr(bounded, "LONGEST", LIMIT)
    assert refused_by(source) != "_concat"


@pytest.mark.parametrize("source", PIECES)
def test_pieces_are_not_put_together_to_a_long_text(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LONGEST", LIMIT)
    assert refused_by(source) == "_concat"
