"""mlxtune fuse, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxtune.cli import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlxtune.data.chat import Example
    from mlxtune.ship.export import Request

data_option = click.option("--data", metavar="PATH", help="Held-out rows to compare on.  [default: the run's own]")
no_verify_option = click.option("--no-verify", is_flag=True, help="Do not compare the result with the trained model.")
base_option = click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="HF_DIR",
    help="Merge into this original 16-bit model.",
)


@click.command()
@common.model_option()
@click.option("--adapter", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The run's folder.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The merged model.")
@click.option("--bits", type=click.Choice(["4", "8", "16"]), default="16", show_default=True, help="16: not quantized.")
@base_option
@data_option
@no_verify_option
@common.force_option
def fuse(
    model: str, adapter: Path, out: Path, bits: str, base: Path | None, data: str | None, no_verify: bool, force: bool
) -> None:
    """Fold an adapter into its model: one MLX folder that needs no adapter.

    The sum is made in float32. Afterwards the fused model is compared with model + adapter on held-out rows, and the
    share of the adapter's effect that survived is printed. 4-bit rounding loses much of a small update.

    \b
    mlxtune fuse --model model --adapter run --out fused
    mlxtune fuse --model model --adapter run --out fused-4bit --bits 4
    """
    from mlxtune import backend
    from mlxtune.model import hub
    from mlxtune.ship import export

    backend.prepare()
    path = hub.resolve(model)
    examples = None if no_verify else _held_out(path, adapter, data)
    console = common.console()
    with console.status("merging, comparing with the trained model"):
        request = export.Request(path, adapter, out, base, examples=examples, force=force)
        report = export.to_mlx(request, int(bits))
    result = common.stdout()
    result.print(f"{out}: {bits} bits")
    if report is None:
        return
    result.print(report.survival())
    if base is not None:
        console.print(f"note: that includes the difference between {base} and {path}", style="yellow", soft_wrap=True)
    elif not report.survived:
        console.print(
            f"note: {bits}-bit rounding changed the model by up to {report.max_difference:.2g} in a logit, tuning by "
            f"{report.base_max_difference:.2g}; --bits 16, or the adapter beside its model, keeps the tune",
            style="yellow",
            soft_wrap=True,
        )


def _held_out(path: Path, adapter: Path | None, data: str | None) -> Sequence[Example]:
    """Rows for a proof: --data's, else the run's own validation rows."""
    from mlxtune import session
    from mlxtune.data.tokenizer import load_tokenizer
    from mlxtune.errors import UserError

    config = common.run_settings(adapter, data)
    if not config.data.path:
        raise UserError("the proof needs held-out rows", "Name some: --data PATH; or leave it out: --no-verify.")
    return session.held_out(load_tokenizer(path), path, config, own=data is None).examples


# Which options mean something for which target.
TARGETS = {
    "peft": ("base_name",),
    "hf": ("base", "dtype", "base_name"),
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
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The export: a folder, or for GGUF a .gguf file.",
)
@base_option
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
@data_option
@no_verify_option
@common.force_option
def export(
    model: str,
    adapter: Path | None,
    target: str,
    out: Path,
    base: Path | None,
    dtype: str | None,
    kind: str | None,
    ollama: bool,
    base_name: str,
    data: str | None,
    no_verify: bool,
    force: bool,
) -> None:
    """Ship to CUDA users (PEFT, Hugging Face) and to llama.cpp, Ollama and LM Studio (GGUF).

    The export is loaded by transformers, PEFT or llama.cpp (when installed, else read back) and compared with the
    trained model on held-out rows before it is given its name.

    \b
    mlxtune export --model model --adapter run --to peft --out adapter --base-name OWNER/NAME
    mlxtune export --model model --adapter run --to hf --out merged --dtype bfloat16
    mlxtune export --model model --adapter run --to gguf --out tuned.gguf --type q4_k_m --ollama
    mlxtune export --model model --adapter run --to gguf-lora --out adapter.gguf
    """
    from mlxtune.errors import UserError

    given = {"base": base, "dtype": dtype, "type": kind, "ollama": ollama, "base_name": base_name}
    useless = [name for name, value in given.items() if value and name not in TARGETS[target]]
    if useless:
        option = f"--{useless[0].replace('_', '-')}"
        fitting = ", ".join(name for name, options in TARGETS.items() if useless[0] in options)
        raise UserError(f"{option} has no effect with --to {target}", f"It is for: {fitting}.")
    from mlxtune import backend
    from mlxtune.model import hub
    from mlxtune.model.load import source_of
    from mlxtune.ship import export as shipping

    backend.prepare()
    path = hub.resolve(model)
    examples = None if no_verify else _held_out(path, adapter, data)
    if not base_name and not Path(model).expanduser().exists() and source_of(path)["kind"] == "hf":
        base_name = model  # a hub id, used as it is
    request = shipping.Request(path, adapter, out, base, dtype, base_name, examples, force)
    console = common.console()
    if target.startswith("gguf"):
        _export_gguf(request, target, kind, ollama)
        return
    with console.status(f"exporting to {target}, comparing with the trained model"):
        report = shipping.to_peft(request) if target == "peft" else shipping.to_hf(request)
    result = common.stdout()
    result.print(f"{out}: {target}" + ("" if report is None else f", {report.line()}"))
    if target == "peft" and not shipping.base_name(request, source_of(path)):
        console.print(
            "note: the adapter names no base model (unknown here); --base-name OWNER/NAME writes it", style="yellow"
        )


def _export_gguf(request: Request, target: str, kind: str | None, ollama: bool) -> None:
    from rich.progress import Progress

    from mlxtune.ship import gguf

    console = common.console()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"writing {request.out.name}", total=None)
        exported = gguf.ship(
            request, target, kind, ollama, lambda done, total: bar.update(task, completed=done, total=total)
        )
    for note in exported.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    proof = "" if exported.proof is None else f", {exported.proof.line()}"
    common.stdout().print(f"{request.out}: {exported.what}, {exported.bytes / (1 << 20):,.1f} MiB{proof}")
