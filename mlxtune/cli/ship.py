"""mlxtune fuse, export, verify."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import json_text, refuse_existing
from mlxtune_convert.sizes import size

from mlxtune.api import exporting
from mlxtune.cli import common, in_project
from mlxtune.cli.options import Command, Need, OptionFor
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.api.exporting import Form
    from mlxtune.data.chat.masking import Example
    from mlxtune.ship.artefacts import Artefact
    from mlxtune.ship.merge import Progress
    from mlxtune.ship.request import Request
    from mlxtune.ship.verify import Report

ENOUGH_ROWS = 32  # for codes that are not fitted to a few rows
OWN_ROWS = (
    "Held-out rows to compare on.  [default: the run's own, never fetched from the hub; without --adapter: "
    "a text that comes with mlxtune]"
)


def out_option(metavar: str, text: str, required: bool = True) -> Callable[..., Any]:
    return click.option("--out", required=required, type=click.Path(path_type=Path), metavar=metavar, help=text)


def base_option(**settings: Any) -> Callable[..., Any]:
    return click.option(
        "--base",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        metavar="HF_DIR",
        help="Merge into this original 16-bit model.",
        **settings,
    )


def proof_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a new artefact is proven, and whether it may replace an old one."""
    compared = Need("no_verify", (False,), "nothing is compared", "Leave out one of the two.")
    for option in (
        common.force_option,
        click.option("--no-verify", is_flag=True, help="Do not compare the result with the trained model."),
        click.option("--data", metavar="PATH", cls=OptionFor, needs=compared, help=OWN_ROWS),
    ):
        command = option(command)
    return command


@click.command(cls=Command)
@common.model_of_run_option()
@common.adapter_option(required=True, text="The run's folder.")
@out_option("DIR", "The merged model.")
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16"]),
    default="16",
    show_default=True,
    help="Bits per weight; 16: not quantized.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    cls=OptionFor,
    needs=Need("bits", ("4", "8"), "nothing is quantized", "Add --bits 4 or 8, or leave it out."),
    help="Weights that share a scale, for --bits 4 or 8.  [default: the model's]",
)
@base_option()
@proof_options
@common.json_option
def fuse(bits: str, group_size: str | None, as_json: bool, **request_options: Any) -> None:
    """Fold an adapter into its model: one MLX folder that needs no adapter.

    The sum is made in float32. 4-bit codes are chosen by what they do to the run's own training rows (GPTQ); rounding
    to the nearest would lose much of a small update. Afterwards the fused model is compared with model + adapter on
    held-out rows, and the share of the tune that survived is printed.

    \b
    mlxtune fuse --model model --adapter run --out fused
    mlxtune fuse --model model --adapter run --out fused-4bit --bits 4
    """
    from mlxtune.ship.artefacts import FusedMlx
    from mlxtune.ship.export import ship
    from mlxtune.ship.verify import Report

    request = exporting.request(**request_options, note=common.note)
    rows = _training_rows(request.model, request_options["adapter"], request_options["data"]) if bits == "4" else ()
    artefact = FusedMlx(int(bits), int(group_size) if group_size else None, calibration=rows)
    with _progress("merging, comparing with the trained model") as progress:
        shipped = ship(request, artefact, progress)
    result = common.stdout()
    if not as_json:
        result.print(f"{request.out}: {shipped.what}")
    for note in shipped.notes:
        common.note(note)
    if as_json:
        click.echo(json_text({"path": str(request.out), **shipped.to_json()}))
        return
    if isinstance(shipped.proof, Report):
        result.print(shipped.proof.survival())
        _note_what_is_lost(request, bits, shipped.proof)


def _note_what_is_lost(request: Request, bits: str, report: Report) -> None:
    """Say what the measured difference is due to, where it is not small."""
    if request.base is not None:
        common.note(f"that includes the difference between {request.base} and {request.model}")
    elif report.verdict == "lossy" or report.max_difference > report.base_max_difference:
        better = "--bits 16" if bits == "8" else "--bits 8 or 16"
        common.note(
            f"{bits}-bit rounding changed the model by up to {report.max_difference:.2g} in a logit, tuning by "
            f"{report.base_max_difference:.2g}; {better}, or the adapter beside its model, keeps the tune"
        )


def _training_rows(model: Path, adapter: Path, data: str | None) -> Sequence[Example]:
    """The run's own training rows, to choose 4-bit codes by; none when they cannot be found, which is said.

    data: --data, which may name them.
    """
    from mlxtune.ship.good_rows import of_good_answers
    from mlxtune.train import reach
    from mlxtune.train.run_data import read_data
    from mlxtune.train.run_folder import RunFolder

    try:
        config = RunFolder(adapter).config(flags={"model.path": str(model)})
        is_named = data is not None and data == config.data.path
        local = reach.LocalOnly(data="" if is_named else reach.compared(config.data))
        rows = of_good_answers(read_data(config, local=local)[0].train)
    except UserError as error:
        common.note(f"no training rows to choose codes by ({error.message}): rounding to the nearest")
        return ()
    if len(rows) < ENOUGH_ROWS:
        what = "rows" if rows.rows == len(rows) else "examples"
        common.note(f"only {len(rows)} training {what} to choose codes by; {ENOUGH_ROWS} are better")
    return rows


def _for(*targets: str) -> Need:
    """An option for these words of `--to` alone."""
    return Need("target", targets)


@click.command(cls=Command)
@common.model_of_run_option()
@common.adapter_option()
@click.option(
    "--to",
    "target",
    type=click.Choice(exporting.FORMS),
    help="peft, gguf-lora: an adapter; hf, gguf: a (merged) model.  [default: all that mlxtune.yaml lists]",
)
@out_option("PATH", "The export: a folder, or for GGUF a .gguf file.", required=False)
@click.option(
    "--dtype",
    type=click.Choice(exporting.DTYPES),
    cls=OptionFor,
    needs=_for("hf"),
    help="hf: how weights are stored.  [default: the model's]",
)
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    cls=OptionFor,
    needs=_for("gguf"),
    help="gguf: keep (MLX's own codes), f32, f16, bf16, q8_0, q4_k_m ...  [default: keep; merged: the model's floats]",
)
@click.option(
    "--ollama",
    is_flag=True,
    cls=OptionFor,
    needs=_for("gguf", "gguf-lora"),
    help="gguf, gguf-lora: write a Modelfile beside it.",
)
@click.option(
    "--base-name",
    default="",
    metavar="OWNER/NAME",
    help="The original model on the hub.  [default: where it was converted from]",
)
@click.option(
    "--push",
    metavar="USER/REPO",
    cls=OptionFor,
    needs=_for("peft", "hf"),
    help="Upload the export to the hub, into a private repository.",
)
@click.option(
    "--public",
    is_flag=True,
    cls=OptionFor,
    needs=Need("push", why="nothing is uploaded"),
    help="Push into a repository that everyone sees.",
)
@base_option(cls=OptionFor, needs=_for("hf", "gguf"))
@proof_options
@common.json_option
def export(
    target: Form | None,
    dtype: str | None,
    kind: str | None,
    ollama: bool,
    push: str | None,
    public: bool,
    as_json: bool,
    **request_options: Any,
) -> None:
    """Ship to CUDA users (PEFT, Hugging Face) and to llama.cpp, Ollama and LM Studio (GGUF).

    The export is loaded by transformers, PEFT or llama.cpp (when installed, else read back) and compared with the
    trained model on held-out rows (without --adapter: on a text that comes with mlxtune) before it is given its name.
    In a folder with mlxtune.yaml the adapter is that of its run, and without --to what it lists is made, one after the
    other.

    \b
    mlxtune export --model model --adapter run --to peft --out adapter --base-name OWNER/NAME
    mlxtune export --model model --adapter run --to hf --out merged --dtype bfloat16
    mlxtune export --model model --adapter run --to gguf --out tuned.gguf --type q4_k_m --ollama
    mlxtune export --model model --adapter run --to gguf-lora --out adapter.gguf
    mlxtune export --model model --to gguf --out base.gguf
    """
    # Of a Hugging Face folder it is more than what is merged into: the parts come from it that MLX does not have.
    if target == "gguf" and request_options["base"] is not None and request_options["adapter"] is None:
        raise UserError("--base has no effect without --adapter: nothing is merged", "Name that model as --model.")
    from mlxtune.ship import push as uploads

    if push:
        uploads.check_repo(push, public)
    if target is None:
        listed = in_project.exports(request_options["out"])
        for one in listed:  # before any is made
            refuse_existing(Path(one.out), request_options["force"])
        for one in listed:
            artefact = exporting.artefact(one.to, None, one.type or None, ollama=False)
            _export(one.to, artefact, {**request_options, "out": Path(one.out)}, as_json)
        return
    if request_options["out"] is None:
        raise UserError("no place for the export", "Name it: --out PATH.")
    artefact = exporting.artefact(target, dtype, kind, ollama)
    _export(target, artefact, request_options, as_json, push, public)


def _export(
    target: str,
    artefact: Artefact,
    request_options: dict[str, Any],
    as_json: bool,
    push: str | None = None,
    public: bool = False,
) -> None:
    """Make one export, upload it where asked, and say what came of it.

    target: a word of FORMS; request_options: as `exporting.request` takes them.
    """
    from mlxtune.ship.export import ship

    request = exporting.request(**request_options, note=common.note)
    with _progress(f"exporting to {target}, comparing with the trained model") as progress:
        shipped = ship(request, artefact, progress)
    if not as_json:
        common.stdout().print(f"{request.out}: {shipped.line()}")
    for note in shipped.notes:
        common.note(note)
    address = _push(request.out, push, public) if push else None
    if as_json:
        click.echo(json_text({"path": str(request.out), **shipped.to_json(), "pushed": address}))
    elif address is not None:
        common.stdout().print(address)


@contextmanager
def _progress(text: str) -> Iterator[Progress]:
    """A bar on standard error, where somebody looks; yields what is told how many weights are written."""
    from rich.progress import Progress as Bars

    console = common.console()
    with Bars(console=console, transient=True, disable=not console.is_interactive) as bars:
        bar = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _push(folder: Path, repository: str, public: bool) -> str:
    """Upload an export, and say what goes up. Returns its address."""
    from mlxtune.ship import push

    console = common.console()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        console.print(f"uploading {file.relative_to(folder)}, {size(file.stat().st_size)}", soft_wrap=True)
    with console.status(f"uploading to {repository}"):
        return push.push(folder, repository, public)


@click.command()
@click.argument("export", type=click.Path(path_type=Path))
@common.model_of_run_option()
@common.adapter_option()
@click.option("--data", metavar="PATH", help=OWN_ROWS)
@common.json_option
def verify(export: Path, model: str, adapter: Path | None, data: str | None, as_json: bool) -> None:
    """Prove that an export is what was trained: fused and Hugging Face models, PEFT adapters.

    The export is run by transformers or PEFT (an MLX folder by MLX) and compared with model + adapter on held-out rows.
    The report is written into the export's folder; a failed proof exits with 2.

    \b
    mlxtune verify merged --model model --adapter run
    mlxtune verify adapter --model model --adapter run --data data/valid.jsonl
    """
    from mlxtune.machine import backend
    from mlxtune.model import hub
    from mlxtune.ship.export import check

    backend.prepare()
    path = hub.resolve(model)
    examples = exporting.for_proof(path, adapter, data, common.note)
    with common.console().status("comparing with the trained model"):
        report, differs = check(export, path, adapter, examples)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        common.stdout().print(f"{export}: {report.line()}")
    if report.verdict in ("failed", "lossy"):
        raise UserError(f"{export} is not the model that was trained ({report.verdict})", differs)
