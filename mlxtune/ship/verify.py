"""The proof: how close an artefact's logits are to the trained model's, on held-out rows (where nothing was trained, on
a text that comes with the tool).

Reference: the trained model (base + adapter) in float32, through MLX. The candidate is run by whoever will use it:
transformers or PEFT when they are installed, else MLX on the files just written. Legend: N positions, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlxtune_convert.files import finite, read_json, write_json
from mlxtune_convert.hf import mtp
from mlxtune_convert.peft import adapter_folder
from mlxtune_convert.sizes import size
from mlxtune_convert.tensors import read_header

from mlxtune.adapter import adapter_files, attach
from mlxtune.compute.loss import inputs_of, supervised_outputs
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model.arrays import to_numpy
from mlxtune.model.load import Loaded, load
from mlxtune.ship.sample import Sample

MAX_ROWS = 16
MAX_POSITIONS = 256
# Limits by storage (see README): measured quantity -> largest (smallest for top-1) value that passes.
LIMITS = {
    "float32": {"max_difference": 1e-3},
    "float16": {"mean_kl": 1e-3, "top1": 0.99},
    "bfloat16": {"mean_kl": 1e-3, "top1": 0.99},
    "8 bits": {"mean_kl": 1e-2, "top1": 0.97},
    "4 bits": {"gain_kept": 0.95},
    "float32, tabled GELU": {"max_difference": 2e-3},  # llama.cpp looks GELU up in a float16 table
    # llama.cpp rounds activations to 8 bits beside quantized weights, which alone turns some 4% of the first choices.
    "q8_0": {"mean_kl": 1e-2},
    "kept codes": {"mean_kl": 2e-2},
}
AT_LEAST = ("top1", "gain_kept")  # the others are at most
REPORT_FILE = "verification.json"
MARGIN = 10.0  # the tune must move the logits this many times further than the measured error, or nothing is proven

# What a report calls its two sides and its text.
TRAINED = "trained model (base + adapter), float32, MLX"
UNTUNED = "the model, float32, MLX"
HELD_OUT = "held-out rows"
SHIPPED = "a text that comes with mlxtune"

Runner = Callable[[Batch], np.ndarray]


@dataclass(frozen=True)
class Reference:
    """Logits of the trained model and of its base, [N, V] float32 each, at the supervised positions of `batches`.
    name: TRAINED or, without an adapter, UNTUNED; text: HELD_OUT or SHIPPED.
    """

    batches: list[Batch]
    targets: np.ndarray
    trained: np.ndarray
    base: np.ndarray
    name: str = TRAINED
    text: str = HELD_OUT


@dataclass(frozen=True)
class Report:
    """A measured statement. base_*: trained against base, the size of what was learned; share: projection of the
    candidate's change of logits on the trained one's; gain_kept: share of the loss improvement that survived; text:
    what it was measured on."""

    reference: str
    candidate: str
    rows: int
    positions: int
    max_difference: float
    mean_difference: float
    mean_kl: float
    top1: float
    loss: float
    trained_loss: float
    base_loss: float
    base_max_difference: float
    base_mean_kl: float
    share: float
    gain_kept: float | None
    verdict: str = "measured"
    text: str = HELD_OUT

    def to_json(self) -> dict[str, Any]:
        """JSON has no NaN and no infinity: such numbers become null."""
        return finite(asdict(self))

    def write(self, folder: Path) -> None:
        """verification.json for programs, verification.md for people."""
        write_report(folder, self.to_json())

    def survival(self) -> str:
        gain = "" if self.gain_kept is None else f", {self.gain_kept:.1%} of the loss improvement"
        return f"{self.share:.1%} of the adapter's effect survived{gain} ({self.positions} held-out tokens)"

    def line(self) -> str:
        moved = "" if self.reference == UNTUNED else f" (tuning moved them by {self.base_max_difference:.1e})"
        return (
            f"{self.verdict}: max logit difference {self.max_difference:.1e}{moved}, KL {self.mean_kl:.1e}, "
            f"top-1 {self.top1:.1%}, on {self.positions} tokens of {self.text}, run by {self.candidate}"
        )


def write_report(folder: Path, facts: dict[str, Any]) -> None:
    """Put a proof beside the artefact, as JSON and as a table."""
    write_json(folder / REPORT_FILE, facts)
    rows = [f"| {key.replace('_', ' ')} | {_shown(value)} |" for key, value in facts.items()]
    measured = f"measured on {facts['text']}" if "text" in facts else ""
    lines = [f"# Verification: {facts['verdict']}", "", f"| {measured} | |", "|---|---|", *rows, ""]
    (folder / REPORT_FILE).with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def require_memory(parameters: int) -> None:
    """Raise UserError when a proof in float32 would not fit this machine's memory: it would page, not fail."""
    needed, have = 4 * parameters, backend.memory_bytes()
    if needed > 0.8 * have:
        raise UserError(
            f"comparing in float32 needs {size(needed)}, this machine has {size(have)}",
            "Leave the comparison out (--no-verify), or run it on a larger machine.",
        )


def trained_model(model: str, adapter: Path | None) -> Loaded:
    """The model that exports are compared with: in float32, with the adapter on it."""
    loaded = load(model, "float32")
    if adapter is not None:
        adapter_files.load_adapter(loaded.model, adapter, loaded.config)
    return loaded


def reference(model: str, adapter: Path | None, examples: Sequence[Example]) -> Reference:
    """Run the trained model and its base, in float32, on up to MAX_POSITIONS tokens of the examples."""
    loaded = trained_model(model, adapter)
    batches, count = [], 0
    for row in range(min(len(examples), MAX_ROWS)):
        if count < MAX_POSITIONS:
            batches.append(collate(examples, [row]))
            count += batches[-1].targets
    targets = np.concatenate([batch.supervised()[1] for batch in batches])
    run = mlx_runner(loaded)
    trained = _gather(run, batches)
    base = trained
    if adapter is not None:
        with attach.switched_off(loaded.model):
            base = _gather(run, batches)
    text = SHIPPED if isinstance(examples, Sample) else HELD_OUT
    return Reference(batches, targets, trained, base, UNTUNED if adapter is None else TRAINED, text)


@dataclass(frozen=True)
class MlxRunner:
    """Logits at a batch's supervised positions, by mlx-lm's model."""

    model: nn.Module

    def __call__(self, batch: Batch) -> np.ndarray:
        return to_numpy(supervised_outputs(self.model, None, inputs_of(batch, None)).astype(mx.float32))


def mlx_runner(loaded: Loaded) -> MlxRunner:
    return MlxRunner(loaded.model)


def _gather(run: Runner, batches: list[Batch]) -> np.ndarray:
    return np.concatenate([run(batch) for batch in batches])[:MAX_POSITIONS]


def measure(ref: Reference, run: Runner, candidate: str, storage: str) -> Report:
    """Compare a candidate with the reference; `storage` ("float32", "float16", ...) chooses the limits.

    KL is KL(trained || candidate) in nats, averaged over positions. A storage without limits is measured, not judged.
    """
    logits = _gather(run, ref.batches)
    targets = ref.targets[: len(logits)]
    moved, wanted = (logits - ref.base).astype(np.float64), (ref.trained - ref.base).astype(np.float64)
    effect = float((wanted * wanted).sum())
    losses = [_loss(x, targets) for x in (logits, ref.trained, ref.base)]
    gain = losses[2] - losses[1]
    numbers: dict[str, Any] = {
        "rows": len(ref.batches),
        "positions": len(logits),
        "max_difference": float(np.abs(logits - ref.trained).max()),
        "mean_difference": float(np.abs(logits - ref.trained).mean()),
        "mean_kl": _kl(ref.trained, logits),
        "top1": float((logits.argmax(-1) == ref.trained.argmax(-1)).mean()),
        "loss": losses[0],
        "trained_loss": losses[1],
        "base_loss": losses[2],
        "base_max_difference": float(np.abs(wanted).max()),
        "base_mean_kl": _kl(ref.trained, ref.base),
        "share": float((moved * wanted).sum()) / effect if effect else 1.0,
        "gain_kept": (losses[2] - losses[0]) / gain if gain > 1e-6 else None,
    }
    verdict = _verdict(numbers, LIMITS.get(storage, {}), effect > 0)
    return Report(ref.name, candidate, **numbers, verdict=verdict, text=ref.text)


def _verdict(numbers: dict[str, Any], limits: dict[str, float], tuned: bool) -> str:
    """passed; failed (lossy, when quantized: said, not refused); inconclusive: the tune is too small to tell; measured:
    no limits for this storage, or nothing that they could be held to.
    """
    if not np.isfinite(numbers["max_difference"]):
        return "failed"
    if not limits or any(numbers[name] is None for name in limits):
        return "measured"
    beyond = (numbers[n] < limit if n in AT_LEAST else numbers[n] > limit for n, limit in limits.items())
    if any(beyond):
        return "lossy" if limits in (LIMITS["8 bits"], LIMITS["4 bits"]) else "failed"
    if "gain_kept" in limits:
        return "passed"  # a share of the tune: it is the measure itself
    measure = "max_difference" if "max_difference" in limits else "mean_kl"
    unclear = tuned and numbers[f"base_{measure}"] < MARGIN * numbers[measure]
    return "inconclusive" if unclear else "passed"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _kl(true: np.ndarray, other: np.ndarray) -> float:
    p, q = _log_softmax(true), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _loss(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(-_log_softmax(logits)[np.arange(len(targets)), targets].mean())


def has_transformers() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def has_peft() -> bool:
    return has_transformers() and importlib.util.find_spec("peft") is not None


def transformers_version() -> str:
    return importlib.metadata.version("transformers")


def _quiet() -> None:
    """Before PyTorch is loaded. The other library's progress bars and its notes on its own future would only confuse
    here. And PyTorch makes a folder for what it compiles, among the temporary files, and leaves it there; nothing is
    compiled here, and no folder needs to be made where it is one that is there.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _model_class(config: Any) -> Any:
    """transformers' class of a configuration: the one that its checkpoint names."""
    import transformers

    name = next(iter(config.architectures or []), "")
    found = getattr(transformers, str(name), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModelForCausalLM


def _not_loaded(library: str, folder: Path, error: Exception) -> UserError:
    """For an error of a library that reads a folder: it raises whatever its parts raise."""
    reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
    return UserError(
        f"{library} {importlib.metadata.version(library)} does not load {folder} ({reason})",
        "Either it is not as it was written, or this version wants something else (a bug, then: please report it).",
    )


def transformers_runner(folder: Path) -> TorchRunner:
    """An exported folder, run by transformers in float32. Raises UserError for missing or unexpected tensors."""
    return TorchRunner(transformers_model(folder).eval())


def transformers_model(folder: Path) -> Any:
    """Load an exported folder with transformers, in float32. Raises UserError for missing or unexpected tensors."""
    _quiet()
    import torch
    from transformers import AutoConfig

    try:
        # Without trust_remote_code=False the library would ask the user whether to run code that lies in the folder.
        kind = _model_class(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
        model, info = kind.from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except ImportError:  # a part of it is in a library that is not installed
        raise
    except Exception as error:
        raise _not_loaded("transformers", folder, error) from error
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    # transformers leaves out blocks that predict further tokens, but knows them by the numbers of some checkpoints.
    settings = read_json(folder / "config.json", "a model folder")
    unknown = [name for name in wrong.pop("unexpected_keys", []) if not mtp.belongs(name, settings)]
    wrong |= {"unexpected_keys": unknown} if unknown else {}
    if wrong:
        names = "; ".join(f"{key.partition('_')[0]}: {', '.join(map(str, found[:3]))}" for key, found in wrong.items())
        raise UserError(
            f"{folder} does not load whole in transformers {transformers_version()} ({names})",
            "Either it is not as it was written, or this version names the family's tensors otherwise than mlxtune "
            "does (a bug, then: please report it). --no-verify exports without running it.",
        )
    return model


def peft_runner(base: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> TorchRunner:
    """The exported adapter on the dense float32 form of the base it was trained on, through transformers and PEFT.

    base: tensors under Hugging Face's names, handed over in memory; nothing is written.
    """
    _quiet()
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    built = AutoConfig.for_model(**config)
    state = {name: torch.from_numpy(np.array(base.pop(name))) for name in list(base)}
    model, info = _model_class(built).from_pretrained(
        None, config=built, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    # What MLX never had (a vision tower) is not what the adapter is on.
    if info["unexpected_keys"] or info["mismatched_keys"]:
        wrong = [*info["unexpected_keys"], *info["mismatched_keys"]]
        names = ", ".join(map(str, wrong[:3]))
        raise UserError(
            f"the base does not fit the model of transformers {transformers_version()} ({names})",
            "This version names the family's tensors otherwise than mlxtune does, which is a bug: please report it.",
        )
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    saved = read_header(folder / adapter_folder.WEIGHTS_FILE).get(f"{adapter_folder.PREFIX}{name}.weight")
    if saved and saved["shape"][0] > len(model.get_input_embeddings().weight):  # tokens were added
        model.resize_token_embeddings(saved["shape"][0], mean_resizing=False)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        raise _not_loaded("PEFT", folder, error) from error
    return TorchRunner(adapted.eval())


def text_part(model: Any) -> Any:
    """What answers on text alone: the model itself, but for Llama 4, whose wrapper wants an image (transformers 5)."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.language_model if whole.config.model_type == "llama4" else model


@dataclass(frozen=True)
class TorchRunner:
    """The same by a model of transformers, or PEFT's around one."""

    model: Any

    def __call__(self, batch: Batch) -> np.ndarray:
        import torch

        positions, _ = batch.supervised()
        with torch.no_grad():
            logits = text_part(self.model)(torch.from_numpy(batch.ids[:, :-1].astype(np.int64))).logits
        rows: np.ndarray = logits.reshape(-1, logits.shape[-1])[torch.from_numpy(positions.astype(np.int64))]
        return rows.float().numpy()  # type: ignore[attr-defined]
