"""The proof: how close an artefact's logits are to the trained model's.

    reference   base + adapter, float32, in MLX      logits [N, V] at N supervised positions of held-out rows
                base alone, float32, in MLX          logits [N, V] at the same positions
    candidate   the artefact, run by whoever will use it (`runners`)    logits [N, V]

Where nothing was trained there are no held-out rows, so a text that comes with the tool is taken (`sample`).

Worked example: one position, a vocabulary of two tokens, a float16 export.

    trained (2.0, 1.0)   base (1.0, 1.0)   candidate (2.001, 1.0)

    max_difference   0.001    |2.001 - 2.0|: the candidate against the trained model
    base_max_diff.   1.0      |1.0 - 2.0|: what tuning did to this logit
    share            1.001    the candidate's change of logits (1.001, 0), projected on the tune's (1.0, 0)
    mean_kl          1e-7     nats, KL(trained || candidate)
    base_mean_kl     0.11     KL(trained || base): what tuning did
    top1             1.0      both choose token 0

Its type chooses the limits: float16 passes with a KL of at most 1e-3 and 99% equal first choices. Both hold here, and
the verdict is "passed", because the tune moved the logits (0.11) far more than the error did (1e-7). Had the tune
moved them by less than MARGIN times the error, an export of the base alone would have passed as well: the limits hold,
and nothing is proven, which is "inconclusive". `Verdict` lists all outcomes.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mlxtune_convert.files import digest, finite, write_json

from mlxtune.adapter import adapter_files, attach
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate
from mlxtune.model.load import Loaded, load
from mlxtune.ship.runners import MlxRunner, Runner
from mlxtune.ship.sample import Sample

MAX_ROWS = 16  # held-out rows that are compared
MAX_POSITIONS = 256  # supervised positions of them: [256, V] float32 three times is what a proof holds
REPORT_FILE = "verification.json"
MARGIN = 10.0  # the tune must move the logits this many times further than the measured error, or nothing is proven
# Nats: an export without limits that is further than this from what it was made of answers otherwise. For a model of 8
# billion weights llama.cpp measured 0.03 for q4_k_m, 0.10 for q3_k_m, 0.33 for q2_k (its tools/perplexity/README.md).
FAR = 0.1
NO_GAIN = 1e-6  # nats: a loss that fell by no more has no improvement of which a share could survive

# What a report calls its two sides and its text.
TRAINED = "trained model (base + adapter), float32, MLX"
UNTUNED = "the model, float32, MLX"
HELD_OUT = "held-out rows"
SHIPPED = "a text that comes with mlxtune"

Verdict = Literal[
    "passed",
    "failed",  # beyond a limit, or no numbers at all: the artefact is refused
    "lossy",  # beyond a limit, by rounding to few bits: said, and kept
    "inconclusive",  # within the limits, but so is the base: the tune is too small to tell
    "measured",  # no limits for this type, or nothing that they could be held to
]


@dataclass(frozen=True)
class Limits:
    """What an artefact of one type may differ by and still pass. None: this quantity is not judged."""

    max_difference: float | None = None  # of a logit, at most
    mean_kl: float | None = None  # nats, at most
    top1: float | None = None  # share of positions with the same first choice, at least
    gain_kept: float | None = None  # share of the loss improvement, at least; a share of the tune itself
    lossy: bool = False  # rounding to few bits may go beyond: that is said, not refused

    def broken_by(self, measured: dict[str, Any]) -> bool:
        """Whether one of the measured quantities is beyond its limit."""
        at_most = (("max_difference", self.max_difference), ("mean_kl", self.mean_kl))
        at_least = (("top1", self.top1), ("gain_kept", self.gain_kept))
        too_large = any(limit is not None and measured[name] > limit for name, limit in at_most)
        too_small = any(limit is not None and measured[name] < limit for name, limit in at_least)
        return too_large or too_small


# By storage, as `Artefact.storage` names it; README ("Shipping") says what they mean to a user.
LIMITS = {
    "float32": Limits(max_difference=1e-3),
    "float16": Limits(mean_kl=1e-3, top1=0.99),
    "bfloat16": Limits(mean_kl=1e-3, top1=0.99),
    "8 bits": Limits(mean_kl=1e-2, top1=0.97, lossy=True),
    "4 bits": Limits(gain_kept=0.95, lossy=True),
    "float32, tabled GELU": Limits(max_difference=2e-3),  # llama.cpp looks GELU up in a float16 table
    # llama.cpp rounds activations to 8 bits beside quantized weights, which alone turns some 4% of the first choices.
    "q8_0": Limits(mean_kl=1e-2),
    "kept codes": Limits(mean_kl=2e-2),
}
ANOTHER_BASE = "another base"  # a storage without limits: the bases themselves differ


@dataclass(frozen=True)
class Reference:
    """What the trained model computes, which candidates are compared with."""

    batches: list[Batch]  # one row each
    targets: np.ndarray  # [N] int32, the supervised tokens
    trained: np.ndarray  # [N, V] float32, logits of base + adapter
    base: np.ndarray  # [N, V] float32, logits of the base alone
    name: str = TRAINED  # or UNTUNED, without an adapter
    text: str = HELD_OUT  # or SHIPPED
    adapter: str = ""  # digest of the adapter's file; "": there is none


@dataclass(frozen=True)
class Report:
    """A measured statement on one artefact; as its JSON has it."""

    reference: str  # what it was compared with: Reference.name
    candidate: str  # the program that ran the artefact
    rows: int  # that were compared
    positions: int  # N
    max_difference: float  # largest difference of a logit, candidate against trained
    mean_difference: float  # mean absolute difference of the logits
    mean_kl: float  # KL(trained || candidate) in nats, mean over positions
    top1: float  # share of positions at which both choose the same token first
    loss: float  # the candidate's cross-entropy on the targets, nats a token
    trained_loss: float  # the trained model's
    base_loss: float  # the base's
    base_max_difference: float  # base against trained: the size of what was learned
    base_mean_kl: float  # KL(trained || base) in nats
    share: float  # the candidate's change of logits, projected on the trained model's: 1.0 is all of it
    gain_kept: float | None  # share of the loss improvement that survived; None where the loss did not fall
    verdict: Verdict = "measured"  # see `Verdict`
    text: str = HELD_OUT  # what it was measured on
    adapter: str = ""  # digest of the file of the adapter that was trained; "": none was

    def to_json(self) -> dict[str, Any]:
        """JSON has no NaN and no infinity: such numbers become null."""
        return finite(asdict(self))

    def write(self, folder: Path) -> None:
        """verification.json for programs, verification.md for people."""
        write_report(folder, self.to_json())

    def survival(self) -> str:
        """What is left of the tune, for people."""
        gain = "" if self.gain_kept is None else f", {self.gain_kept:.1%} of the loss improvement"
        return f"{self.share:.1%} of the adapter's effect survived{gain} ({self.positions} held-out tokens)"

    def warning(self) -> str:
        """What must be said of a measured artefact that is no good likeness, for people; "" where nothing must."""
        changed = f"it changed the likeliest token at {1 - self.top1:.0%} of the positions (KL {self.mean_kl:.2g})"
        if self.reference != UNTUNED and self.mean_kl > self.base_mean_kl:
            than = f"more than tuning did (KL {self.base_mean_kl:.2g})"
            return f"{changed}, which is {than}; a type of more bits keeps the tune"
        if self.mean_kl > FAR:
            return f"{changed}: this export answers otherwise than the model does; choose a type of more bits"
        return ""

    def line(self) -> str:
        """The whole statement, for people."""
        moved = "" if self.reference == UNTUNED else f" (tuning moved them by {self.base_max_difference:.1e})"
        return (
            f"{self.verdict}: max logit difference {self.max_difference:.1e}{moved}, KL {self.mean_kl:.1e}, "
            f"top-1 {self.top1:.1%}, on {self.positions} tokens of {self.text}, run by {self.candidate}"
        )


@dataclass(frozen=True)
class ReadBack:
    """The weaker proof where no program can run it: every tensor in the files is bit for bit what it must be."""

    tensors: int  # that were compared
    missing: str = "PEFT"  # what would have run it
    verdict: str = "read back"  # stands where a Report has its verdict
    adapter: str = ""  # as a Report has it

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, folder: Path) -> None:
        write_report(folder, self.to_json())

    def line(self) -> str:
        return f"{self.verdict}: {self.tensors} tensors equal theirs bit for bit ({self.missing} is not installed)"


Proof = Report | ReadBack


def write_report(folder: Path, facts: dict[str, Any]) -> None:
    """Put a proof beside the artefact, as JSON and as a table."""
    write_json(folder / REPORT_FILE, facts)
    rows = [f"| {key.replace('_', ' ')} | {_shown(value)} |" for key, value in facts.items()]
    measured = f"measured on {facts['text']}" if "text" in facts else ""
    lines = [f"# Verification: {facts['verdict']}", "", f"| {measured} | |", "|---|---|", *rows, ""]
    (folder / REPORT_FILE).with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def trained_model(model: str, adapter: Path | None) -> Loaded:
    """The model that exports are compared with: in float32, with the adapter on it."""
    loaded = load(model, "float32")
    if adapter is not None:
        adapter_files.load_adapter(loaded.model, adapter, loaded.config)
    return loaded


def reference(model: str, adapter: Path | None, examples: Sequence[Example]) -> Reference:
    """Run the trained model and its base, in float32, on up to MAX_POSITIONS tokens of the examples."""
    loaded = trained_model(model, adapter)
    batches: list[Batch] = []
    count = 0
    for row in range(min(len(examples), MAX_ROWS)):
        if count >= MAX_POSITIONS:
            break
        batches.append(collate(examples, [row]))
        count += batches[-1].targets
    targets = np.concatenate([batch.supervised()[1] for batch in batches])
    run = MlxRunner(loaded.model)
    trained = _logits(run, batches)
    text = SHIPPED if isinstance(examples, Sample) else HELD_OUT
    if adapter is None:
        return Reference(batches, targets, trained, trained, UNTUNED, text)
    with attach.switched_off(loaded.model):
        base = _logits(run, batches)
    return Reference(batches, targets, trained, base, TRAINED, text, digest_of(adapter))


def digest_of(adapter: Path | None) -> str:
    """Of an adapter's file; "" for none."""
    file = None if adapter is None else adapter_files.adapter_file(adapter)
    return "" if file is None else digest(file)


def _logits(run: Runner, batches: list[Batch]) -> np.ndarray:
    """[N, V] float32 of all batches, N at most MAX_POSITIONS."""
    return np.concatenate([run(batch) for batch in batches])[:MAX_POSITIONS]


def measure(ref: Reference, run: Runner, candidate: str, storage: str) -> Report:
    """Compare a candidate with the reference. candidate: the program that runs it, for the report; storage: its type
    ("float32", "float16", ...), which chooses the limits. A storage without limits is measured, not judged.
    """
    logits = _logits(run, ref.batches)
    targets = ref.targets[: len(logits)]
    change = (logits - ref.base).astype(np.float64)  # [N, V], what the candidate does to the base
    wanted = (ref.trained - ref.base).astype(np.float64)  # [N, V], what the tune does to it
    effect = float((wanted * wanted).sum())
    loss, trained_loss, base_loss = (cross_entropy(each, targets) for each in (logits, ref.trained, ref.base))
    gain = base_loss - trained_loss
    difference = np.abs(logits - ref.trained)
    measured: dict[str, Any] = {
        "rows": len(ref.batches),
        "positions": len(logits),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "mean_kl": _kl(ref.trained, logits),
        "top1": float((logits.argmax(-1) == ref.trained.argmax(-1)).mean()),
        "loss": loss,
        "trained_loss": trained_loss,
        "base_loss": base_loss,
        "base_max_difference": float(np.abs(wanted).max()),
        "base_mean_kl": _kl(ref.trained, ref.base),
        "share": float((change * wanted).sum()) / effect if effect else 1.0,
        "gain_kept": (base_loss - loss) / gain if gain > NO_GAIN else None,
    }
    verdict = _verdict(measured, LIMITS.get(storage), tuned=effect > 0)
    return Report(ref.name, candidate, **measured, verdict=verdict, text=ref.text, adapter=ref.adapter)


def _verdict(measured: dict[str, Any], limits: Limits | None, tuned: bool) -> Verdict:
    """measured: numbers by the names of Report's fields; limits: None for a storage that has none; tuned: whether the
    adapter changes any logit.
    """
    if not np.isfinite(measured["max_difference"]):
        return "failed"
    if limits is None:
        return "measured"
    if limits.gain_kept is not None and measured["gain_kept"] is None:
        return "measured"  # the loss did not fall: there is no share to hold to the limit
    if limits.broken_by(measured):
        return "lossy" if limits.lossy else "failed"
    if limits.gain_kept is not None:
        return "passed"  # judged by a share of the tune, which cannot pass by chance
    quantity = "mean_kl" if limits.max_difference is None else "max_difference"
    if tuned and measured[f"base_{quantity}"] < MARGIN * measured[quantity]:
        return "inconclusive"
    return "passed"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """[N, V] -> [N, V] float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)  # so that exp cannot overflow
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _kl(true: np.ndarray, other: np.ndarray) -> float:
    """KL(true || other) of two arrays of logits [N, V], in nats, mean over N."""
    p, q = _log_softmax(true), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over N of -log p(target), in nats. logits: [N, V]; targets: [N]."""
    return float(-_log_softmax(logits)[np.arange(len(targets)), targets].mean())
