"""One artefact of each kind out of a finished run, each with the proof that `mlxtune fuse` and `export` make."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mlxtune.data.template.tokenizer_changes import tokenizer_of
from mlxtune.evaluate.held_out import held_out
from mlxtune.selftest import runs
from mlxtune.selftest.outcome import Check, Found, Workshop
from mlxtune.ship import verify
from mlxtune.ship.artefacts import Artefact, FusedMlx, HuggingFace, Peft
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import Gguf, GgufAdapter
from mlxtune.ship.request import Request
from mlxtune.ship.verify import ReadBack
from mlxtune.train.run_folder import RunFolder

GROUP = "Exports, against the trained model"
# float32: a type whose rounding does not hide a mistake.
FORMS: dict[str, Artefact] = {
    "fuse": FusedMlx(dtype="float32"),
    "hf": HuggingFace("float32"),
    "peft": Peft(),
    "gguf": Gguf("f32"),
    "gguf-lora": GgufAdapter(),
}
LIMIT = verify.LIMITS["float32"].max_difference


def checks() -> list[Check]:
    return [Check(GROUP, kind if kind == "fuse" else f"export {kind}", partial(_shipped, kind)) for kind in FORMS]


def _shipped(kind: str, shop: Workshop) -> Found:
    request = shop.once("request", lambda: _request(shop))
    proof = ship(replace(request, out=shop.folder / kind), FORMS[kind]).proof
    if isinstance(proof, ReadBack):
        return Found(0, 0, "different", proof.line())
    if proof is None:
        return Found(float("nan"), said="no proof was made")
    said = (
        f"largest difference of a logit; tuning moved them by {proof.base_max_difference:.1f}; run by {proof.candidate}"
    )
    wrong = "" if proof.verdict == "passed" else proof.line()
    return Found(proof.max_difference, LIMIT, said=said, wrong=wrong)


def _request(shop: Workshop) -> Request:
    made = runs.usual(shop)
    examples = held_out(tokenizer_of(made.base, made.folder), made.base, RunFolder(made.folder).config())
    return Request(made.base, made.folder, shop.folder, examples=examples)
