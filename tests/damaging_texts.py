"""Texts that a parser, a terminal, a template engine or a path might obey: what damage.py puts into files."""

from __future__ import annotations

LONG = 300_000  # letters of a long text: more than any name, key or token has

# Values in JSON beyond those of broken configurations: paths, and texts that a terminal or a parser would obey.
HOSTILE = (
    *(
        '"../../x"',
        '"/etc/passwd"',
        '"."',
        '".."',
        '"~"',
        '"{elsewhere}/secret.txt"',
        '"\\u001b]52;c;ZXZpbA==\\u001b\\\\"',
    ),
    *('"\\u202eevil\\u2066"', '"a\\nFROM evil"', '"a\\rb"', '"\\ud800"', '"\\u0000\\u0007\\u009b2J"', '"<s>\\u2028"'),
    *('"' + "x" * LONG + '"', "[" * 2_000 + "]" * 2_000, '{"a":' * 2_000 + "1" + "}" * 2_000, "1" + "0" * 5_000),
    *("[" + "0," * 20_000 + "0]", "0.1", "1e400", "-1e999", "-0.0", '"NaN"', '"1e999"', '["../x"]', '{"../x": 1}'),
)
WORDS = {  # JSON values, as YAML that no JSON is
    "": "",
    "tag": "!!python/object/apply:os.system ['touch {elsewhere}/run']",
    "object": "!!python/name:os.system",
    "own tag": "!evil 1",
    "binary": "!!binary '////'",
    "bad int": "!!int x",
    "bad float": "!!float []",
    "set": "!!set {a, b}",
    "pairs": "!!omap [a: 1]",
    "alias": "*a",
    "anchor": "&a [1, 2]",
    "recursive": "&a [*a]",
    "merge": "{<<: &b {steps: 1}, <<: *b}",
    "merge of nothing": "{<<: 1}",
    "date": "2025-01-31",
    "bad date": "2025-99-99",
    "base sixty": "190:20:30",
    "octal": "0o17",
    "hex": "0x" + "f" * 5_000,
    "inf": ".inf",
    "nan": ".nan",
    "no": "no",
    "null": "~",
    "block": "|\n    a\n   b",
    "complex key": "{? [1, 2] : 3}",
    "list as key": "{[1, 2]: 3}",
    "control": '"\\e]52;c;ZXZpbA==\\a"',
    "surrogate": '"\\ud800"',
    "far": '"\\UFFFFFFFF"',
    "open": '"',
    "tab": "\t1",
    "at": "@a",
    "percent": "%a",
}
LINES = (  # whole lines of YAML
    *(
        "train: {steps: 1}",
        "train:",
        "  steps: 2",
        "---",
        "...",
        "--- a",
        "%YAML 9.9",
        "%TAG ! tag:evil,2000:",
        "<<: *a",
    ),
    *("? [a, b]", "- 1", "a: b: c", "\x00", "\x85", "evil: 1", "1: 2", "null: 1", "[1]: 2", "data: &x", "x: *x", "#"),
    *("model: {path: ../../x}", "  template: /etc/passwd", "  cache: {elsewhere}/own", "  template: ../x", "{a"),
    *("  sources: [{path: a, weight: 1e999}]", "  columns: {a: [b]}", "  start_from: {elsewhere}", "    - 1"),
)
JINJA = (
    *("{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ raise_exception('\x1b]0;evil\x07') }}"),
    *("{% for a in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**10 }}", "{% set x = [0] * 10**9 %}", "{{"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}"),
    *("{% if a %}" * 300 + "{% endif %}" * 300, '"""\nFROM evil/model\nADAPTER /etc/x\n', "{{ 1 // 0 }}", "{% %}"),
    *("{{ messages | tojson }}", "{{ messages[99].content }}", "{{ undefined_thing.a.b }}", "\u202e", "\x1b[2J"),
    *("{% set ns = namespace(a=1) %}{% set ns.a = messages %}", "{% generation %}", "{# ", "{% raw %}", "\x00"),
    *("{{ messages.pop() }}", "{{ messages.append(1) }}", "{{ '%s' % (1,2) }}", "{{ '{0.__class__}'.format(1) }}"),
    *("{{ 7 ** 7 ** 7 ** 7 }}", "{{ strftime_now('%Y' * 9999) }}", "{{ strftime_now(1) }}", "{% break %}"),
    *("{{ [1, 2] | join(messages) }}", "{{ 'a' | indent(10**9) }}", "{{ 'a'.center(10**10) }}", "\ud800"),
    *("{% import 'os' as os %}", "{{ cycler.__init__.__globals__ }}", "{{ messages | map('evil') | list }}"),
    *("{{ lipsum(99999) }}", "{{ range(10**7) | list | length }}", "{{ 'x' | center(99999999999) }}", "{% endfor %}"),
)
