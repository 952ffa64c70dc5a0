"""mlxtune fuse, export, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import shown_name
from mlxtune_convert.sizes import size

from mlxtune.cli import common

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlxtune.data.chat.masking import Example
    from mlxtune.ship.export import Request

ENOUGH_ROWS = 32  # for codes that are not fitted to a few rows

data_option = click.option(
    "--data",
    metavar="PATH",
    help="Held-out rows to compare on.  [default: the run's own, never fetched from the hub; without --adapter: "
    "a text that comes with mlxtune]",
)


def out_option(metavar: str, text: str) -> Callable[..., Any]:
    return click.option("--out", required=True, type=click.Path(path_type=Path), metavar=metavar, help=text)


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `_request` reads, of any merge or export."""
    for option in (
        common.force_option,
        click.option("--no-verify", is_flag=True, help="Do not compare the result with the trained model."),
        data_option,
        click.option(
            "--base",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            metavar="HF_DIR",
            help="Merge into this original 16-bit model.",
        ),
    ):
        command = option(command)
    return command


def _request(model: str, adapter: Path | None, data: str | None, no_verify: bool, **others: Any) -> Request:
    """What to ship, with the rows for its proof. others: fields of the request."""
    from mlxtune.machine import backend
    from mlxtune.model import hub
    from mlxtune.model.load import source_of
    from mlxtune.ship.export import Request

    backend.prepare()
    path = hub.resolve(model)
    examples = _held_out(path, adapter, data, no_verify)
    if not others.get("base_name") and not Path(model).expanduser().exists() and source_of(path)["kind"] == "hf":
        others["base_name"] = model  # a hub id, used as it is
    return Request(path, adapter, examples=examples, **others)


@click.command()
@common.model_option()
@click.option("--adapter", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The run's folder.")
@out_option("DIR", "The merged model.")
@click.option("--bits", type=click.Choice(["4", "8", "16"]), default="16", show_default=True, help="16: not quantized.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Of --bits 4 or 8.  [default: the model's]")
@request_options
def fuse(bits: str, group_size: str | None, **shared: Any) -> None:
    """Fold an adapter into its model: one MLX folder that needs no adapter.

    The sum is made in float32. 4-bit codes are chosen by what they do to the run's own training rows (GPTQ); rounding
    to the nearest would lose much of a small update. Afterwards the fused model is compared with model + adapter on
    held-out rows, and the share of the tune that survived is printed.

    \b
    mlxtune fuse --model model --adapter run --out fused
    mlxtune fuse --model model --adapter run --out fused-4bit --bits 4
    """
    from dataclasses import replace

    from mlxtune.errors import UserError
    from mlxtune.ship import export

    if group_size and bits == "16":
        raise UserError("--group-size has no effect with --bits 16: nothing is quantized")
    request = _request(**shared)
    if bits == "4":
        request = replace(request, calibration=_training_rows(request.model, shared["adapter"], shared["data"]))
    with common.console().status("merging, comparing with the trained model"):
        report = export.to_mlx(request, int(bits), int(group_size) if group_size else None)
    result = common.stdout()
    result.print(f"{request.out}: {bits} bits")
    for note in request.notes:
        common.note(note)
    if report is None:
        return
    result.print(report.survival())
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
    from mlxtune.errors import UserError
    from mlxtune.train import reach
    from mlxtune.train.run_data import read_data
    from mlxtune.train.run_folder import RunFolder

    try:
        config = RunFolder(adapter).config(flags={"model.path": str(model)})
        is_named = data is not None and data == config.data.path
        local = reach.LocalOnly(data="" if is_named else reach.compared(config.data))
        rows = read_data(config, local=local)[0].train
    except UserError as error:
        common.note(f"no training rows to choose codes by ({error.message}): rounding to the nearest")
        return ()
    if len(rows) < ENOUGH_ROWS:
        what = "rows" if rows.rows == len(rows) else "examples"
        common.note(f"only {len(rows)} training {what} to choose codes by; {ENOUGH_ROWS} are better")
    return rows


def _held_out(
    path: Path,
    adapter: Path | None,
    data: str | None,
    skip: bool = False,
    or_else: str = "or leave it out: --no-verify",
) -> Sequence[Example] | None:
    """Rows for a proof: --data's, else the run's own validation rows, or the text that comes with mlxtune where there
    is no adapter; None for no proof. or_else: what the command has beside --data.
    """
    from mlxtune.data.template.tokenizer_changes import tokenizer_of
    from mlxtune.errors import UserError
    from mlxtune.ship import sample
    from mlxtune.ship.verify import MAX_POSITIONS, SHIPPED

    if skip and data:
        raise UserError("--data has no effect with --no-verify: nothing is compared", "Leave out one of the two.")
    if skip:
        return None
    if adapter is None and data is None:
        common.note(f"no adapter, so no rows were held out: the proof is on {SHIPPED} (--data PATH: on your own)")
        return sample.read(tokenizer_of(path, None), MAX_POSITIONS)
    config = common.run_settings(adapter, data)
    if not config.data.path and not config.data.sources:
        raise UserError(
            f"the proof needs held-out rows, and {adapter} is no run that names its own",
            "; ".join(filter(None, ("Name some: --data PATH", or_else))) + ".",
        )
    return common.held_out(tokenizer_of(path, adapter), path, adapter, data)[0]


# Which options mean something for which target.
TARGETS = {
    "peft": ("base_name", "push", "public"),
    "hf": ("base", "dtype", "base_name", "push", "public"),
    "gguf": ("base", "type", "base_name", "ollama"),
    "gguf-lora": ("base_name", "ollama"),
}


@click.command()
@common.model_option()
@common.adapter_option
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(list(TARGETS)),
    help="peft, gguf-lora: an adapter; hf, gguf: a (merged) model.",
)
@out_option("PATH", "The export: a folder, or for GGUF a .gguf file.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="hf: how weights are stored.  [default: the model's]",
)
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="gguf: keep (MLX's own codes), f32, f16, bf16, q8_0, q4_k_m ...  [default: keep; merged: the model's floats]",
)
@click.option("--ollama", is_flag=True, help="gguf, gguf-lora: write a Modelfile beside it.")
@click.option(
    "--base-name",
    default="",
    metavar="OWNER/NAME",
    help="The original model on the hub.  [default: where it was converted from]",
)
@click.option("--push", metavar="USER/REPO", help="Upload the export to the hub, into a private repository.")
@click.option("--public", is_flag=True, help="With --push: into a repository that everyone sees.")
@request_options
def export(target: str, kind: str | None, ollama: bool, push: str | None, public: bool, **shared: Any) -> None:
    """Ship to CUDA users (PEFT, Hugging Face) and to llama.cpp, Ollama and LM Studio (GGUF).

    The export is loaded by transformers, PEFT or llama.cpp (when installed, else read back) and compared with the
    trained model on held-out rows (without --adapter: on a text that comes with mlxtune) before it is given its name.

    \b
    mlxtune export --model model --adapter run --to peft --out adapter --base-name OWNER/NAME
    mlxtune export --model model --adapter run --to hf --out merged --dtype bfloat16
    mlxtune export --model model --adapter run --to gguf --out tuned.gguf --type q4_k_m --ollama
    mlxtune export --model model --adapter run --to gguf-lora --out adapter.gguf
    mlxtune export --model model --to gguf --out base.gguf
    """
    from mlxtune.errors import UserError

    given = {"type": kind, "ollama": ollama, "push": push, "public": public, **shared}
    special = dict.fromkeys(name for names in TARGETS.values() for name in names)
    useless = [name for name in special if given[name] and name not in TARGETS[target]]
    if useless:
        option = f"--{useless[0].replace('_', '-')}"
        fitting = ", ".join(name for name, options in TARGETS.items() if useless[0] in options)
        raise UserError(f"{option} has no effect with --to {target}", f"It is for: {fitting}.")
    if shared["base"] is not None and shared["adapter"] is None and target == "gguf":
        raise UserError("--base has no effect without --adapter: nothing is merged", "Name that model as --model.")
    from mlxtune.ship import card
    from mlxtune.ship import export as shipping

    if push:
        card.check_repo(push, public)
    elif public:
        raise UserError("--public has no effect without --push: nothing is uploaded")
    request = _request(**shared)
    out = request.out
    console = common.console()
    if target.startswith("gguf"):
        _export_gguf(request, target, kind, ollama)
        return
    with console.status(f"exporting to {target}, comparing with the trained model"):
        report = shipping.to_peft(request) if target == "peft" else shipping.to_hf(request)
    result = common.stdout()
    result.print(f"{out}: {target}" + ("" if report is None else f", {report.line()}"))
    for note in request.notes:
        common.note(note)
    if push:
        for file in sorted(path for path in out.rglob("*") if path.is_file()):
            console.print(f"uploading {file.relative_to(out)}, {size(file.stat().st_size)}", soft_wrap=True)
        with console.status(f"uploading to {push}"):
            result.print(card.push(out, push, public))
    if target == "peft" and not shipping.names_base(out):
        common.note("the adapter names no base model (unknown here); --base-name OWNER/NAME writes it")


@click.command()
@click.argument("export", type=click.Path(path_type=Path))
@common.model_option()
@common.adapter_option
@data_option
@common.json_option
def verify(export: Path, model: str, adapter: Path | None, data: str | None, as_json: bool) -> None:
    """Prove that an export is what was trained: fused and Hugging Face models, PEFT adapters.

    The export is run by transformers or PEFT (an MLX folder by MLX) and compared with model + adapter on held-out rows.
    The report is written into the export's folder; a failed proof exits with 2.

    \b
    mlxtune verify merged --model model --adapter run
    mlxtune verify adapter --model model --adapter run --data data/valid.jsonl
    """
    from mlxtune.errors import UserError
    from mlxtune.machine import backend
    from mlxtune.model import hub
    from mlxtune.ship import export as shipping

    backend.prepare()
    path = hub.resolve(model)
    examples = _held_out(path, adapter, data, or_else="") or ()
    with common.console().status("comparing with the trained model"):
        report, differs = shipping.check(export, path, adapter, examples)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        common.stdout().print(f"{export}: {report.line()}")
    if report.verdict in ("failed", "lossy"):
        raise UserError(f"{export} is not the model that was trained ({report.verdict})", differs)


def _export_gguf(request: Request, target: str, kind: str | None, ollama: bool) -> None:
    from rich.progress import Progress, TextColumn

    from mlxtune.ship import gguf, modelfile

    if ollama:
        modelfile.check_name(request.out.name)
    columns = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
    with Progress(*columns, console=common.console(), transient=True) as bar:
        task = bar.add_task(f"writing {shown_name(request.out.name)}", total=None)
        exported = gguf.ship(
            request, target, kind, ollama, lambda done, total: bar.update(task, completed=done, total=total)
        )
    for note in exported.notes:
        common.note(note)
    proof = "" if exported.proof is None else f", {exported.proof.line()}"
    common.stdout().print(f"{request.out}: {exported.what}, {size(exported.bytes)}{proof}")
