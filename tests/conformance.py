"""How every family does against transformers and PEFT: `python tests/conformance.py > tests/families.md`."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny
import zoo
from mlxtune_convert.gguf import architectures, metadata
from mlxtune_convert.hf import families
from mlxtune_convert.peft import adapter_folder as files
from safetensors.numpy import load_file

from mlxtune.adapter import adapter_files, attach, peft
from mlxtune.adapter.layers import SWITCH
from mlxtune.adapter.plan import AdapterPlan, linear_paths, outside_blocks
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import convert
from mlxtune.model.arrays import to_numpy
from mlxtune.model.load import load
from mlxtune.ship import runners, verify
from mlxtune.ship.artefacts import HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.merge import open_merged
from mlxtune.ship.request import Request

IDS = np.random.default_rng(5).integers(3, 250, (2, 24))


@dataclass
class Row:
    """Largest differences of logits (losses for `step`); inverse and back: whether the bits came back."""

    family: str
    logits: float = float("nan")
    inverse: str = ""
    step: float = float("nan")
    peft: float = float("nan")
    back: bool = False
    hf: float = float("nan")
    not_in_peft: int = 0  # linear layers that PEFT cannot adapt
    gguf: str = ""  # llama.cpp's architecture
    refused: str = ""


def measure(family: str, root: Path) -> Row:
    """Make a tiny model of the family, convert it, train two steps on the result, take it out every way there is."""
    original, folder = tiny.make_model(root / family, family), root / f"{family}-mlx"
    row = Row(family)
    config = json.loads((original / "config.json").read_text())
    try:
        convert.convert(str(original), folder, convert.Quantization.of(16, None, None), "float32")
        loaded = load(str(folder), "float32")
        theirs = reference(original)
        untrained = logits(theirs)
        row.logits = apart(mlx_logits(loaded.model), untrained)
        layout = families.by_model_type(config)
    except UserError as error:
        row.refused = families.NOT_EXPORTED.get(family) or error.message.partition(": ")[2]
        return row
    row.inverse = inverse(original, folder, layout)
    with contextlib.suppress(UserError):
        row.gguf = architectures.by_model_type(metadata.text_of(loaded.config)["model_type"]).gguf
    model = loaded.model
    paths = {path for block in model.layers for path in linear_paths(block)} | set(outside_blocks(model, (nn.Linear,)))
    covered = sorted(
        path for path in paths if any(p.endswith(path) for p in layout.peft_targets(_full(model)).values())
    )
    row.not_in_peft = len(paths) - len(covered)
    spec = AdapterPlan.of(model, LoraSection(rank=2, alpha=4, targets=covered))
    attach.attach(model, spec, seed=1)
    train(model)
    run = root / f"{family}-run"
    run.mkdir()
    adapter_files.save_config(run, spec)
    adapter_files.save_tensors(model, run, spec.file)
    ours = mlx_logits(model)
    request = Request(folder, run, root / f"{family}-hf", base=original if layout.tower else None)
    ship(request, HuggingFace())
    merged = runners.transformers_model(request.out)  # refuses missing and unexpected keys
    row.hf = apart(logits(merged), ours)
    out = root / f"{family}-peft"
    out.mkdir()
    files.write_adapter(out, peft.from_model(model, spec.config, config, ""))
    adapted = logits(with_adapter(theirs, out))
    row.peft, row.step = apart(adapted, ours), abs(cross_entropy(adapted) - cross_entropy(ours))
    peft.import_adapter(out, root / f"{family}-back", str(folder), False)
    row.back = same(run, root / f"{family}-back")
    assert apart(untrained, ours) > 20 * max(row.hf, row.peft), f"{row}: the step changed too little to tell"
    return row


def _full(model: Any) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, *SWITCH))]


def inverse(folder: Path, converted: Path, layout: Any) -> str:
    """Whether our table makes the original tensors of those of the converted model, bit for bit: in the files, or where
    transformers reads several forms, in its memory.
    """
    original = load_file(folder / "model.safetensors")
    mlx = {name: to_numpy(array) for name, array in open_merged(converted, None).tensors()}
    back = dict(layout.to_hf(mlx.items(), np))
    kept = {name for name in original if not layout.is_dropped(name)}
    form = ""
    if {name: array.shape for name, array in back.items()} != {name: original[name].shape for name in kept}:
        towers = {name: array for name, array in original.items() if name not in kept}
        original, back = in_memory(folder, original), in_memory(folder, {**back, **towers})
        kept, form = set(original), " in memory"
    changed = [name for name in kept if original[name].tobytes() != back[name].tobytes()]
    worst = max((float(np.abs(original[name] - back[name]).max()) for name in changed), default=0.0)
    return f"{len(changed)} norms to {worst:.0e}" if changed else f"bits{form}"


def train(model: Any) -> None:
    """Two plain gradient steps: the first moves B, the second A as well."""

    def loss(_: Any) -> mx.array:
        ids = mx.array(IDS)
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss)
    for _ in range(2):
        _, gradients = step(0)
        flat = dict(nn.utils.tree_flatten(gradients))
        norm = float(mx.sqrt(sum((g * g).sum() for g in flat.values())).item())
        values = attach.trained_tensors(model)
        model.load_weights([(name, values[name] - g * (2.0 / norm)) for name, g in flat.items()], strict=False)
        mx.eval(model.parameters())


def reference(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig

    model = runners.model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def in_memory(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers makes of a model's tensors: its own parameters and buffers, by their names."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    model = runners.model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return runners.text_part(model)(torch.from_numpy(IDS)).logits.numpy()


def mlx_logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array(IDS)))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def cross_entropy(values: np.ndarray) -> float:
    return float(verify.cross_entropy(values[:, :-1].reshape(-1, values.shape[-1]), IDS[:, 1:].reshape(-1)))


def same(one: Path, other: Path) -> bool:
    left, right = (load_file(adapter_files.adapter_file(folder)) for folder in (one, other))
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def table(rows: list[Row]) -> str:
    head = """# Families

Measured by `python tests/conformance.py > tests/families.md` on tiny random models of each family, in float32,
against transformers and PEFT. Each is what `mlxtune convert` made of the folder that transformers saved. Vision models
are compared on text, with transformers' own multimodal class. Differences are the largest of any logit: after
converting, after two LoRA steps run by PEFT (and of the loss), and of the merged Hugging Face export. "bits": our table
gives the original tensors back bit for bit ("in memory": in a form of the files other than transformers', which it
loads as the same tensors). Layers that PEFT cannot adapt (experts kept in another form there) train here and leave
through `--to hf`. GGUF: llama.cpp's architecture, whose logits tests/test_gguf_families.py compares with transformers'.

| family | HF -> MLX | inverse | loss after LoRA | PEFT out | PEFT back | HF out | not in PEFT | GGUF |
|---|---|---|---|---|---|---|---|---|
"""
    lines, refused = [], []
    for row in rows:
        if row.refused:
            refused.append(f"| {row.family} | {'' if np.isnan(row.logits) else f'{row.logits:.0e}'} | {row.refused} |")
            continue
        numbers = f"{row.logits:.0e} | {row.inverse} | {row.step:.0e} | {row.peft:.0e} | {'bits' if row.back else 'NO'}"
        lines.append(f"| {row.family} | {numbers} | {row.hf:.0e} | {row.not_in_peft or ''} | {row.gguf} |")
    tail = f"""
{len(rows) - len(refused)} families leave. {len(refused)} are refused by name, because mlx-lm's model is not the one in
transformers, or cannot be compared with it (`mlxtune fuse` keeps what was trained); without a number, transformers'
form of the family cannot be loaded at all:

| family | HF -> MLX | why |
|---|---|---|
"""
    untried = [f"| {name} |  | {why} |" for name, why in families.NOT_EXPORTED.items() if name not in zoo.SHAPES]
    return head + "\n".join(lines) + "\n" + tail + "\n".join([*refused, *untried])


def main() -> None:
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()
    backend.prepare()
    names = sys.argv[1:] or list(zoo.SHAPES)
    with tempfile.TemporaryDirectory() as root:
        print(table([measure(name, Path(root)) for name in names]))


if __name__ == "__main__":
    main()
