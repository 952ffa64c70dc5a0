"""Model folders with a damaged config.json or index, converted: how does the command end?

    python tests/mutated_models.py 5000

Everything must end with exit status 0 or 2, in one line where it is 2, within seconds, and leave no folder that is not
a model. The conversions run in a process of their own, with limits on time and memory; one that dies is a failure too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
FAMILIES = (
    *("llama", "qwen3_moe", "gemma3", "mamba2", "deepseek_v3", "gpt2", "lfm2", "gpt_oss", "phi3", "qwen3_5_text"),
    *("cohere2", "falcon_h1", "gemma3_text", "glm4_moe"),
)
SECONDS, MEMORY = 5, 12 << 30
STUCK = 30  # seconds after which the process itself is ended: a native loop hears no alarm


def _deep(depth: int, end: str = "1") -> str:
    return "[" * depth + end + "]" * depth


# What a value becomes; texts in JSON, since some of it is no value of Python's.
VALUES = (
    *("null", "true", "false", '""', '"text"', "[]", "{}", "[1, 2]", '{"a": 1}', "0", "1", "-1", "2", "3.7", "0.0"),
    *("1000000000000", "2147483648", "9223372036854775808", "1e308", "1e999", "NaN", "-Infinity", "-1e9", "1e-300"),
    *(f"1{'0' * 40}", _deep(60), _deep(3), '"' + "x" * 5000 + '"', '"../../etc"', '"\\u0000"', "[null]", '[{"a": []}]'),
    *('{"__float__": "Infinity"}', "[[1]]", '"32"', "65537", "-2147483649"),
)
# The file as a whole.
TEXTS = (
    *("", "[]", "null", "1", '"text"', "{", "{}", '{"model_type": "llama"}', _deep(100_000), "\ufeff{}", "{'a': 1}"),
    *(f'{{"hidden_size": 1{"0" * 5000}}}', '{"a": NaN}', "\x00" * 100, '{"weight_map": {}}', '{"weight_map": null}'),
)
# Keys that a configuration may have and these do not.
ADDED = (
    *("quantization", "quantization_config", "transformers_weights", "model_file", "auto_map", "text_config"),
    *(
        "rope_scaling",
        "rope_theta",
        "head_dim",
        "layer_types",
        "sliding_window",
        "num_key_value_heads",
        "architectures",
    ),
)
GROUPS = (
    *('{"bits": 0, "group_size": 0}', '{"bits": 4, "group_size": 64}', '{"quant_method": "x"}', '{"bits": "4"}'),
    *('{"bits": 4, "group_size": -1}', '{"quant_method": null}', '{"group_size": 64}', '{"bits": 4, "mode": "x"}'),
)


@dataclass(frozen=True)
class Case:
    """One damaged file. family: of FAMILIES; file: its name; text: what it holds; what: the damage in words."""

    family: str
    file: str
    text: str
    what: str
    bits: str


@dataclass(frozen=True)
class Ended:
    """How a case ended. status: of the command; said: what it printed; fault: what is wrong with that, or ""."""

    case: Case
    status: int
    said: str
    fault: str


def cases(count: int, originals: dict[tuple[str, str], Any], seed: int = 0) -> Iterator[Case]:
    """Always the same ones for a seed. originals: (family, file) -> the JSON that is damaged."""
    chance = random.Random(seed)
    for _ in range(count):
        family = chance.choice(FAMILIES)
        file = "config.json" if chance.random() < 0.8 else INDEX
        bits = "16" if chance.random() < 0.7 else "4"
        if chance.random() < 0.03:
            text = chance.choice(TEXTS)
            yield Case(family, file, text, f"the file is {text[:40]!r}", bits)
            continue
        whole = json.loads(json.dumps(originals[family, file]))
        marks: dict[str, str] = {}
        changes = [_change(whole, chance, marks) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
        text = json.dumps(whole)
        for mark, value in marks.items():
            text = text.replace(f'"{mark}"', value)
        yield Case(family, file, text, "; ".join(changes), bits)


def _change(whole: dict[str, Any], chance: random.Random, marks: dict[str, str]) -> str:
    """Damage one value. marks: texts to be put in afterwards, by what stands for them until then."""

    def put(value: str) -> str:
        mark = f"\ue000{len(marks)}"
        marks[json.dumps(mark)[1:-1]] = value
        return mark

    if chance.random() < 0.12:
        key = chance.choice(ADDED)
        value = chance.choice((*GROUPS, *VALUES))
        whole[key] = put(value)
        return f"{key} added: {value[:40]}"
    places = list(_places(whole))
    if not places:
        return "nothing"
    holder, key = chance.choice(places)
    old = holder[key]
    kind = chance.choice(("drop", "value", "value", "value", "number", "other"))
    if kind == "drop":
        del holder[key]
        return f"{key} dropped"
    if kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        scale: Callable[[Any], Any] = chance.choice(
            (lambda x: x * 2, lambda x: x + 1, lambda x: x - 1, lambda x: -x, lambda x: x / 2, lambda x: str(x))
        )
        holder[key] = scale(old)
    elif kind == "other":
        other, name = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[name])) if _there(other, name) else None
    else:
        value = chance.choice(VALUES)
        holder[key] = put(value)
        return f"{key}: {value[:40]}"
    return f"{key}: {json.dumps(holder[key])[:40]}"


def _there(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a JSON document, as (what holds it, key or number)."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def make(folder: Path) -> dict[tuple[str, str], Any]:
    """The undamaged models, in two shards each; return their configurations and indexes."""
    import tiny

    originals = {}
    for kind in FAMILIES:
        model = tiny.make_model(folder / kind, kind)
        tiny.shard(model, {"total_size": 1})
        for file in ("config.json", INDEX):
            originals[kind, file] = json.loads((model / file).read_text())
    return originals


def run(listed: list[Case], models: Path) -> Iterator[Ended]:
    """Convert each case in a process that is started again where one ends it."""
    waiting = list(listed)
    while waiting:
        with tempfile.TemporaryFile("w+") as given:
            given.writelines(json.dumps(asdict(case)) + "\n" for case in waiting)
            given.seek(0)
            worker = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--worker", str(models)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
            )
            with worker:
                assert worker.stdout is not None and worker.stderr is not None
                for line in worker.stdout:
                    status, said, fault = json.loads(line)
                    yield Ended(waiting.pop(0), status, said, fault)
                printed = worker.stderr.read()
            if waiting:
                yield Ended(waiting.pop(0), worker.returncode, printed[-500:], "the process died")


def work(models: Path) -> None:
    """Read cases from stdin, convert them here, write how each ended to stdout."""
    from mlxtune import cli
    from mlxtune.train import signals

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signals.unwind_on_signals = lambda: None  # this process has several ends
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(SystemExit):  # imports take longer than a case may
        cli.main(["convert", str(models / FAMILIES[0]), f"{name}/out", "--bits", "16"])
    for line in sys.stdin:
        case = Case(**json.loads(line))
        with tempfile.TemporaryDirectory() as name:
            ended = _convert(case, models / case.family, Path(name), cli.main)
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


class TooLong(BaseException):
    """An alarm; nothing that catches errors takes it for one."""


def _convert(case: Case, model: Path, folder: Path, main: Callable[[list[str]], Any]) -> tuple[int, str, str]:
    source, out = folder / "model", folder / "out" / "model"
    source.mkdir()
    for path in model.iterdir():
        if path.name == case.file:
            (source / path.name).write_bytes(case.text.encode("utf-8", "surrogatepass"))
        else:
            os.link(path, source / path.name) if path.stat().st_dev == folder.stat().st_dev else shutil.copy(
                path, source / path.name
            )

    def too_long(number: int, frame: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    own, printed = sys.stderr, io.StringIO()
    status, fault = 1, ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            sys.stderr = printed
            signal.alarm(SECONDS)
            faulthandler.dump_traceback_later(STUCK, exit=True, file=own)
            size = ["--group-size", "32"] if case.bits == "4" else []
            main(["convert", str(source), str(out), "--bits", case.bits, *size])
    except SystemExit as stop:
        status = int(stop.code or 0)
    except TooLong:
        fault = f"more than {SECONDS} seconds"
    except BaseException:
        fault = traceback.format_exc()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        sys.stderr = own
    return status, printed.getvalue(), fault or _fault(status, printed.getvalue(), out)


def _fault(status: int, said: str, out: Path) -> str:
    lines = said.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in said or status not in (0, 2):
        return f"exit status {status}"
    if status == 2 and (len(errors) != 1 or len(lines) - lines.index(errors[0]) > 2 or len(errors[0]) > 1500):
        return f"{len(errors)} error lines of {len(lines)}"
    left = [path.name for path in out.parent.iterdir()] if out.parent.exists() else []
    if status == 2 and left:
        return f"left: {left}"
    if status == 0 and (left != [out.name] or not (out / "config.json").is_file()):
        return f"no model: {left}"
    return ""


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        listed = list(cases(count, make(models), seed))
        statuses: Counter[int] = Counter()
        faults = 0
        for number, ended in enumerate(run(listed, models), 1):
            statuses[ended.status] += 1
            if ended.fault:
                faults += 1
                print(f"{ended.case.family} {ended.case.file} [{ended.case.what}] {ended.status}: {ended.fault}")
                print("    " + ended.said.strip()[-600:].replace("\n", "\n    "), flush=True)
            if os.environ.get("SHOW"):
                print(f"{ended.case.family} [{ended.case.what}] {ended.status}: {ended.said.strip()[:300]}")
            if number % 500 == 0:
                print(f"{number} of {count}: exit statuses {dict(statuses)}, {faults} faults", flush=True)
    print(f"{count} damaged models: exit statuses {dict(statuses)}, {faults} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    work(Path(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else main()
