"""mlxtune convert."""

from __future__ import annotations

from pathlib import Path

import click
from mlxtune_convert.files import json_text
from mlxtune_convert.sizes import size

from mlxtune.cli import common


@click.command()
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    type=click.Choice(["1", "2", "3", "4", "5", "6", "8", "16"]),
    help="Bits per weight; 16: not quantized.  [default: 4]",
)
@click.option("--group-size", type=int, help="Weights that share a scale.  [default: 64]")
@click.option(
    "--mode", type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]), help="Kind of quantization.  [default: affine]"
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type of what is not quantized.  [default: the source's]",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="The MLX model that an adapter (PEFT, GGUF) belongs to, where its files do not say enough.",
)
@click.option(
    "--trust-remote-code",
    "code",
    is_flag=True,
    help="Copy the model's own .py files too (auto_map), for programs that run them; mlxtune never does.",
)
@common.force_option
@common.json_option
def convert(
    src: str,
    dst: Path,
    bits: str | None,
    group_size: int | None,
    mode: str | None,
    dtype: str | None,
    base: Path | None,
    code: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make an MLX model folder from a hub id, an HF or MLX folder, or a GGUF file; an adapter from a PEFT or GGUF one.

    A source that is already quantized (GGUF, MLX) keeps its codes bit for bit, unless --bits, --group-size or --mode
    ask for others. What others' tools quantized (fp8, compressed-tensors, bitsandbytes, GPTQ, AWQ, ModelOpt) keeps its
    4-bit codes where MLX has the same; else it is dequantized, then quantized as asked. What was written is opened
    again and a few tokens run through it before it gets its name.

    \b
    mlxtune convert Qwen/Qwen2.5-0.5B-Instruct qwen-4bit
    mlxtune convert model.Q4_1.gguf model
    mlxtune convert adapter.gguf adapter --base model
    mlxtune convert ./hf-folder model-16bit --bits 16
    mlxtune convert ./peft-adapter adapter
    mlxtune convert owner/peft-adapter adapter --base model
    """
    from mlxtune.adapter import peft
    from mlxtune.errors import UserError
    from mlxtune.model import convert as conversion
    from mlxtune.model import hub

    quantization = conversion.Quantization.of(int(bits) if bits else None, group_size, mode)
    console = common.console()
    with console.status(f"looking for {src}"):
        folder = hub.resolve(src, code)
    if peft.is_adapter(folder):
        if bits or group_size or mode or dtype or code:
            raise UserError(
                f"{src} is a PEFT adapter: --bits, --group-size, --mode, --dtype and --trust-remote-code have no effect"
            )
        made = peft.import_adapter(folder, dst, str(base) if base else None, force)
        for note in made.notes:
            common.note(note)
        if as_json:
            facts = {"layers": made.layers, "variant": made.saved.variant, "base": made.saved.base or None}
            click.echo(json_text({"path": str(dst), "kind": "adapter", **facts, "notes": made.notes}))
            return
        trained_on = f", trained on {made.saved.base}" if made.saved.base else ""
        common.stdout().print(f"{dst}: an adapter of {made.layers} layers ({made.saved.variant}{trained_on})")
        return

    peft.refuse_several(folder)
    if peft.has_weights(folder):
        common.note("the adapter beside the model is left out: in a folder of its own it can be converted.")
    with console.status(f"converting {src}"):
        done = conversion.convert(src, dst, quantization, dtype, force, base, code)
    for note in done.notes:
        common.note(note)
    if as_json:
        facts = {"bytes": done.total_bytes, "bits_per_weight": done.bits_per_weight}
        click.echo(json_text({"path": str(dst), "kind": "model", **facts, "notes": done.notes}))
        return
    common.stdout().print(f"{dst}: {size(done.total_bytes)}, {done.bits_per_weight:.2f} bits per weight")
    recipe = "qlora" if done.bits_per_weight < 16 else "lora"
    common.next_commands(
        ("generate", "--model", dst, "Hello"), ("train", "-c", recipe, "--model", dst, "--data", "DATA")
    )
