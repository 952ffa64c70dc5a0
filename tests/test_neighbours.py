"""Every command, in a folder full of other people's things, with names that would command a terminal: it changes what
it was told to alone, the terminal obeys nothing but our own drawing, and no name begins a line.

One chain of commands, each with what those before it made; each test looks at one of them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import guard
import hostile
import pytest
import terminal
import tiny
from test_layers import COMMANDS

WIDE = {"COLUMNS": "4000"}  # nothing is wrapped: a line begins where somebody began it
FAST = ("--set", "train.steps=2", "--set", "lora.rank=2", "--set", "train.lr=1e-2")
ALL = "".join(hostile.texts()).replace("\0", "")
FAULT = "{{ raise_exception(messages[-1]['content']) }}"  # a chat template that refuses, and says so in others' words


@dataclass(frozen=True)
class Ended:
    """A command's exit status, what the terminal was sent, and what it changed that it should not."""

    status: int
    said: str
    changed: str


def project(folder: Path, outside: Path) -> Path:
    """Somebody else's: names that ours has too, names like those of our temporary files, links that lead out."""
    files = ("config.yaml", "checkpoints/epoch1/model.ckpt", "wandb/run.log", ".lock", "events.jsonl", ".git/HEAD")
    temporary = ("model", "run", "fused", "peft", "hf", "tuned.gguf", "lora.gguf", "rows.jsonl", "adapter")
    likes = [f".{name}.{left}" for name in temporary for left in ("partial-4711", "old-1-0badcafe")]
    for name in (*files, *likes, "tuned.notes", "step-0000001/state.json", "read only"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs")
    (folder / "read only").chmod(0o400)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "linked").symlink_to(outside)
    return folder


def furnished(work: Path, hf_model: Path) -> dict[str, Path]:
    """The places of the chain, by what they are called here, among those of other people."""
    outside = work / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    for variable in ("TMPDIR", "HOME"):
        project(Path(os.environ[variable]) / "theirs", outside)
    thesis = Path(os.environ["XDG_CACHE_HOME"]) / "mlxtune" / "rows" / "thesis" / "doc"
    thesis.parent.mkdir(parents=True, exist_ok=True)
    thesis.write_text("theirs")
    here = project(work / hostile.name(0), outside)
    at = {"here": here, "outside": outside, "theirs": project(here / f"theirs{hostile.name(1)}", outside)}
    at |= {
        name: here / f"{name}{hostile.name(2)}" for name in ("model", "run", "fused", "peft", "hf", "adapter", "made")
    }
    at |= {name: here / f"{name}{hostile.name(3)[:60]}.gguf" for name in ("tuned", "lora")}
    at |= {name: shutil.copytree(hf_model, here / f"{name}{hostile.name(4)}") for name in ("hf", "broken", "refusing")}
    tiny.lose_a_tensor(at["broken"])
    (at["refusing"] / "chat_template.jinja").write_text(FAULT)
    at["demo"] = here / "demo"
    (here / "demo" / "model").mkdir(parents=True)
    (here / "demo" / "model" / "thesis").write_text("theirs")
    return at | _data(here)


def _data(here: Path) -> dict[str, Path]:
    """The rows and configurations of the chain; those of strangers hold all the texts."""
    texts = hostile.texts()
    data = here / f"data{hostile.name(5)}"
    for split, own in (("train", tiny.conversations(16)), ("valid", tiny.conversations(20)[16:])):
        tiny.write_jsonl(data / f"{split}.jsonl", own)
    tiny.write_jsonl(data / f"{hostile.name(6)}.jsonl", [{"text": "unused"}])
    rows = []
    for text in texts:
        answer = {"role": "assistant", "content": text}
        rows += [{"messages": [{"role": role, "content": text}, answer]} for role in ("user", text)] + [{text: 1}]
    table = here / "rows.csv"
    heading = ",".join('"' + text.replace("\0", "").replace('"', "") + '"' for text in texts)
    table.write_bytes(f"{heading}\n".encode() + b",".join([b"x"] * len(texts)) + b"\n")
    values = {"data": {"template_kwargs": dict(zip(texts, texts, strict=True))}, "train": {"sample_prompts": texts[:2]}}
    for name, value in (("values", values), ("keys", {"lora": dict.fromkeys(texts, 1)}), ("sections", {ALL: 1})):
        (here / f"{name}.yaml").write_text(json.dumps(value))
    theirs = {"base_model": ALL, "adapter": ALL, "learning_rate": 1e-4, "datasets": [{"path": ALL, "type": ALL}]}
    theirs |= {"chat_template": ALL, **dict.fromkeys(texts[:40], ALL)}
    (here / "axolotl.yml").write_text(json.dumps(theirs))
    asked = [
        {"messages": [{"role": "user", "content": text}], "reference": text, "checks": ["exact"]} for text in texts[:8]
    ]
    suite = tiny.write_jsonl(here / f"suite{hostile.name(9)}.jsonl", asked)
    policy = here / f"policy{hostile.name(9)}.yaml"
    policy.write_text(json.dumps({"persona": ALL, "forbidden": [ALL]}))
    (here / "guide.md").write_text(f"# {ALL}\n\n{ALL}\n", encoding="utf-8")
    (here / "templates.yaml").write_text(
        json.dumps({"templates": [{"user": "{x}", "assistant": ALL}], "slots": {"x": texts[:4]}})
    )
    answered = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in texts
    ]
    items = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return {
        "answered": tiny.write_jsonl(here / f"answered{hostile.name(9)}.jsonl", answered),
        "suite": suite,
        "policy": policy,
        "answers": tiny.write_jsonl(
            here / f"answers{hostile.name(12)}.jsonl", [{"id": "round 1 prompt 1", "text": items}]
        ),
        "data": data,
        "said": tiny.write_jsonl(here / f"{hostile.name(7)}.jsonl", rows),
        "table": table,
    }


@pytest.fixture(scope="module")
def ended(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How each command of the chain ended, by what it is called here."""
    at = furnished(tmp_path_factory.mktemp("neighbours"), hf_model)
    here, data, said, run, theirs = (at[name] for name in ("here", "data", "said", "run", "theirs"))
    on = ("--model", at["model"])
    tuned = (*on, "--adapter", run)
    found: dict[str, Ended] = {}

    def step(name: str, *words: str | Path, typed: terminal.Typed | None = None, **environment: str) -> None:
        status, text = terminal.ended(*words, typed=typed, **WIDE, **environment)
        found[name] = Ended(status, text, guard.told())

    step("convert", "convert", at["hf"], at["model"])
    shutil.rmtree(at["hf"])  # its name is that of an export
    step("convert what is broken", "convert", at["broken"], here / "never")
    step("data show", "data", "show", *on, "--data", said, "--limit", "600")
    step("data show --json", "data", "show", *on, "--data", said, "--json")
    step("data check", "data", "check", *on, "--data", said, "--html", here / f"check{hostile.name(11)}.html")
    step("data check of a folder", "data", "check", *on, "--data", data)
    step("data check of a table", "data", "check", *on, "--data", at["table"])
    step("data convert", "data", "convert", said, here / f"new{hostile.name(10)}.jsonl", "--drop")
    step("data convert, refused", "data", "convert", said, here / "never.jsonl")
    made = ("make", "instructions", "--seeds", data / "train.jsonl", "--engine", f"replay:{at['answers']}")
    step("make instructions", *made, "--max-requests", "1", "--at-once", "1", "--out", at["made"])
    step("make into theirs", *made, "--out", theirs, "--force")
    init = ("--data", at["answered"], *on, "--yes", "--set", "train.steps=2", "--set", "lora.rank=2")
    step("init", "init", here / f"project{hostile.name(13)}", *init)
    step("train --dry-run", "train", "-c", here / "values.yaml", *on, "--data", data, "--dry-run")
    for kind in ("keys", "sections"):
        step(f"unknown {kind}", "train", "-c", here / f"{kind}.yaml", *on, "--data", data)
    step("train", "train", "-c", here / "values.yaml", *on, "--data", data, "--out", run, *FAST)
    step("train into theirs", "train", *on, "--data", data, "--out", theirs, *FAST)
    long = (*FAST, "--set", "train.steps=100000", "--set", "train.save_every=0")
    step("train, Ctrl-C", "train", *on, "--data", data, "--out", here / "stopped", *long, typed=[("training", "\x03")])
    project(run / "notes", at["outside"])
    for name in (".DS_Store", "step-0000001.zip", "epoch1"):
        (run / "checkpoints" / name).write_text("theirs")
    step("train --resume", "train", "--resume-anyway", "--out", run, "--set", "train.steps=3")
    step("runs", "runs", here)
    step("report", "report", run)
    other = here / f"other{hostile.name(11)}"
    other.mkdir()
    for name in ("config.yaml", "events.jsonl"):
        shutil.copy(run / name, other)
    step("report --with", "report", run, "--with", other, "--out", here / f"both{hostile.name(12)}.html")
    step("report --live, Ctrl-C", "report", run, "--live", typed=[("until", "\x03")])
    step("report into theirs", "report", run, "--out", theirs / "config.yaml")
    step("eval", "eval", *tuned)
    step("generate", "generate", *tuned, "--prompt", ALL, "--max-tokens", "200", "--temperature", "5")
    step("a template's refusal", "generate", "--model", at["refusing"], "--prompt", ALL[:400])
    talk = [("leave", "/system be brief\n"), ("forgotten", "/quit\n")]
    step("chat", "chat", *tuned, typed=talk)
    evaluations = [here / f"{name}{hostile.name(8)}" for name in ("first", "second")]
    page = here / f"page{hostile.name(9)[:60]}.html"
    for name, out in zip(("eval --suite", "eval --suite again"), evaluations, strict=True):
        step(name, "eval", *tuned, "--suite", at["suite"], "--max-tokens", "3", "--out", out, "--html", page)
    step("compare", "compare", *evaluations)
    engine = ("--engine", at["model"], "--max-tokens", "3")
    for what, name, given in (("answers", "--prompts", "suite"), ("turns", "--from", "suite")):
        out = here / f"{what}{hostile.name(11)}"
        step(f"make {what}", "make", what, name, at[given], *engine, "--out", out)
    step("make refusals", "make", "refusals", at["policy"], *engine, "--count", "1", "--out", here / "refusals")
    step("make from-documents", "make", "from-documents", here / "guide.md", *engine, "--out", here / "guided")
    step(
        "make from-template", "make", "from-template", here / "templates.yaml", "--count", "2", "--out", here / "filled"
    )
    curate = ("data", "curate", at["answered"], "--most-alike", "1")
    step("data curate", *curate, *on, "--keep", "2", "--out", here / f"few{hostile.name(11)}.jsonl")
    step("data curate --review", *curate, "--review", "--out", here / "mine.jsonl", typed=[("> ", "q\n")])
    step("rate", "rate", evaluations[0], typed=[("> ", "q\n")])
    step("make pairs, refused", "make", "pairs", evaluations[0], "--out", here / "never.jsonl")  # nothing was rated
    step("fuse", "fuse", *tuned, "--out", at["fused"])
    step("fuse --force", "fuse", *tuned, "--out", at["fused"], "--force", "--no-verify")
    step("fuse over theirs", "fuse", *tuned, "--out", theirs, "--force")
    for target, name in (("peft", "peft"), ("gguf", "tuned"), ("gguf-lora", "lora")):
        step(f"export {target}", "export", *tuned, "--to", target, "--out", at[name])
    with pytest.MonkeyPatch.context() as patch:  # a process that loads PyTorch itself, as a user's does
        patch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        step("export hf", "export", *tuned, "--to", "hf", "--out", at["hf"], MLXTUNE_APART="1")
    step("verify", "verify", at["peft"], *tuned)
    step("convert an adapter", "convert", at["peft"], at["adapter"], "--base", at["model"])
    step("bench, refused", "bench", *on, "--data", data, "--pairs", "5")
    step("doctor", "doctor")
    step("config", "config", "-c", here / "values.yaml")
    step("import-config", "import-config", here / "axolotl.yml")
    step("import-config --out", "import-config", here / "axolotl.yml", "--out", here / "mine.yaml")
    step("completion", "completion", "bash")
    step("demo over theirs", "demo", *on, "--out", at["demo"], "--force")
    step("no such model", "generate", "--model", ALL, "--prompt", "x")
    step("no such data", "data", "check", *on, "--data", ALL)
    step("no such command", ALL)
    step("no such option", "train", f"--{ALL}")
    step("no such choice", "convert", "a", "b", "--bits", ALL)
    step("no such key", "train", *on, "--data", data, "--set", f"{ALL}=1")
    return found


REFUSED = (
    *("convert what is broken", "data check of a table", "data convert, refused", "unknown keys", "unknown sections"),
    *(
        "train into theirs",
        "make into theirs",
        "report into theirs",
        "a template's refusal",
        "fuse over theirs",
        "demo over theirs",
        "no such model",
    ),
    *(
        "make pairs, refused",
        "bench, refused",
        "no such data",
        "no such command",
        "no such option",
        "no such choice",
        "no such key",
    ),
)
DONE = (
    *("convert", "data show", "data show --json", "data check", "data check of a folder", "data convert"),
    *("data curate", "data curate --review", "make from-documents", "make from-template"),
    "make instructions",
    "init",
    *(
        "train --dry-run",
        "train",
        "train --resume",
        "runs",
        "report",
        "report --with",
        "eval",
        "eval --suite",
        "eval --suite again",
        "compare",
        "make answers",
        "make turns",
        "make refusals",
        "rate",
        "generate",
        "chat",
        "fuse",
        "fuse --force",
    ),
    *(
        "export peft",
        "export hf",
        "export gguf",
        "export gguf-lora",
        "verify",
        "convert an adapter",
        "doctor",
        "config",
        "import-config",
        "import-config --out",
        "completion",
    ),
)
STOPPED = ("train, Ctrl-C", "report --live, Ctrl-C")
OF_ROWS = ("data show", "data curate --review")  # prints what people wrote, lines and all


@pytest.mark.parametrize("name", [*DONE, *REFUSED, *STOPPED])
def test_a_command_changes_what_it_is_told_to_and_commands_no_terminal(name: str, ended: dict[str, Ended]) -> None:
    one = ended[name]
    expected = 2 if name in REFUSED else 130 if name in STOPPED else 0
    assert (one.status, one.changed, terminal.obeyed(one.said)) == (expected, "", []), one.said
    forged = [line for line in terminal.lines(one.said) if line.startswith(hostile.LINE)]
    assert forged == [] or name in OF_ROWS


def test_every_command_is_among_them(ended: dict[str, Ended]) -> None:
    assert {name.replace(",", "").split()[0] for name in ended} >= {path[0] for path in COMMANDS if path}
    assert len(ended) == len(DONE) + len(REFUSED) + len(STOPPED)
