"""No command on local paths asks the network for anything: every one of them, each system call for sockets looked at.

    python tests/no_network.py

Linux alone, with strace; a minute or two. Prints a line for each command: its exit status, how many calls for sockets
it made, and how many of these were for the internet; ends with 1 where there was one, or a command failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tiny

PROGRAMS = Path(sys.executable).parent
# A name looked up, or a connection: either begins with a socket of the internet's families. (AF_UNIX leads to a service
# of this machine: nscd, which holds the names of its users.)
INTERNET = re.compile(r"\bAF_(?:INET6?|PACKET)\b")
CALL = re.compile(r"^(?:\d+\s+)?(?:\[pid\s+\d+\]\s+)?[a-z_0-9]+\(")


def commands(model: Path) -> Iterator[str]:
    """The command lines, each with what those before it made in the current folder. model: of transformers."""
    on, tuned = "--model model", "--model model --adapter run"
    yield f"mlxtune convert {model} model"
    yield f"mlxtune data show {on} --data data"
    yield f"mlxtune data check {on} --data data"
    yield "mlxtune data convert data/train.jsonl rows.jsonl"
    yield f"mlxtune train {on} --data data --out run --dry-run --set train.steps=2"
    yield f"mlxtune train {on} --data data --out run --set train.steps=2 --set lora.rank=2"
    yield "mlxtune train --resume-anyway --out run --set train.steps=4"
    yield "mlxtune runs ."
    yield f"mlxtune eval {tuned}"
    yield f"mlxtune eval {tuned} --suite data/valid.jsonl --out evaluation --max-tokens 8"
    yield f"mlxtune generate {tuned} --prompt Hello --max-tokens 8"
    yield f"mlxtune chat {tuned} --max-tokens 8"
    yield f"mlxtune fuse {tuned} --out fused"
    yield f"mlxtune fuse {tuned} --out fused-4bit --bits 4"
    yield f"mlxtune export {tuned} --to peft --out peft --base-name OWNER/NAME"
    yield f"mlxtune export {tuned} --to hf --out hf"
    yield f"mlxtune export {tuned} --to gguf --out tuned.gguf --ollama"
    yield f"mlxtune export {tuned} --to gguf-lora --out lora.gguf"
    yield f"mlxtune verify hf {tuned}"
    yield f"mlxtune verify peft {tuned}"
    yield "mlxtune convert peft adapter --base model"
    yield "mlxtune convert tuned.gguf again"
    yield f"mlxtune bench {on} --data data --rows 8"
    yield f"mlxtune demo {on} --out demo --steps 1"
    yield "mlxtune doctor"
    yield "mlxtune doctor --test"
    yield "mlxtune-convert to-peft run peft-too --base model"
    yield "mlxtune-convert to-mlx peft-too adapter-too --base model"
    yield "mlxtune-convert to-hf model hf-too"
    yield "mlxtune-convert check hf-too model"


def traced(line: str, folder: Path, environment: dict[str, str]) -> tuple[int, list[str]]:
    """(exit status, calls for sockets) of a command and of all processes that it begins."""
    program, *words = line.split()
    record = folder / "calls"
    # --seccomp-bpf: the process is stopped at these calls alone, which is many times as fast.
    tracing = ["strace", "--seccomp-bpf", "-f", "-qq", "-e", "trace=network", "-e", "signal=none", "-o"]
    done = subprocess.run(
        [*tracing, str(record), str(PROGRAMS / program), *words],
        cwd=folder,
        env=environment,
        input="Hello\n",
        capture_output=True,
        text=True,
        check=False,
    )
    calls = [call for call in record.read_text(errors="replace").splitlines() if CALL.match(call)]
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode, calls


def main() -> int:
    if shutil.which("strace") is None:
        print("strace is not here", file=sys.stderr)
        return 1
    failed = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("home", "cache", "temporary"):
            (folder / name).mkdir()
        # A user who never asked to be offline.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        environment |= {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}
        environment |= {"TMPDIR": str(folder / "temporary")}
        for split, rows in (("train", tiny.conversations(16)), ("valid", tiny.conversations(20)[16:])):
            tiny.write_jsonl(folder / "data" / f"{split}.jsonl", rows)
        for line in commands(tiny.make_model(folder / "original")):
            status, calls = traced(line, folder, environment)
            found = [call for call in calls if INTERNET.search(call)]
            failed += bool(found) or status != 0
            said = line.replace(made, "")
            print(
                f"{status}  {len(calls):3} calls  {len(found):3} internet  {said}", *found[:5], sep="\n   ", flush=True
            )
        left = sorted(path.name for name in ("home", "temporary") for path in (folder / name).iterdir())
        print(f"left over in the home and among temporary files: {left or 'nothing'}")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
