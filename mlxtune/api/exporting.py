"""`mlxtune.export`: what was trained, in another program's form, with its proof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mlxtune.api import tuned
from mlxtune.api.arguments import EXPORTING, in_python
from mlxtune.api.evaluating import model_and_adapter
from mlxtune.api.tuned import Note, to_nobody
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.api.tuning import Run
    from mlxtune.data.chat.masking import Example
    from mlxtune.ship.artefacts import Artefact
    from mlxtune.ship.export import Shipped
    from mlxtune.ship.request import Request

Form = Literal["peft", "hf", "gguf", "gguf-lora"]
FORMS: tuple[Form, ...] = get_args(Form)
DTYPES = ("float16", "bfloat16", "float32")  # how the weights of "hf" may be stored


def export(
    model: Run | str | Path,
    adapter: Run | str | Path | None = None,
    *,
    to: Form,
    out: str | Path,
    dtype: str | None = None,
    type: str | None = None,
    ollama: bool = False,
    base: str | Path | None = None,
    base_name: str = "",
    data: str | Path | None = None,
    verify: bool = True,
    force: bool = False,
) -> Shipped:
    """Write a model or an adapter in another program's form, and prove it, as `mlxtune export` does.

    model, adapter: as `evaluate` takes them. to: peft and gguf-lora, an adapter; hf and gguf, a (merged) model. out: a
    folder, or for GGUF a .gguf file. dtype: of hf; type: of gguf ("q8_0"); ollama: write a Modelfile beside a GGUF.
    base: the original 16-bit model, to merge into; base_name: its id on the hub. data: held-out rows for the proof;
    None: the run's own. verify: compare with the trained model; force: replace what is at `out`.

    Returns the form, the proof and what a person must know. Raises UserError for anything wrong, and where the proof
    fails: nothing is kept then.

    >>> shipped = mlxtune.export(run, to="peft", out="adapter", verify=False)
    >>> shipped.what
    'peft'
    """
    if to not in FORMS:
        raise UserError(f"to={to!r} is no form of export", f"There are: {', '.join(FORMS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known", f"There are: {', '.join(DTYPES)}.")
    for name, given, fitting in (("dtype", dtype, ("hf",)), ("type", type, ("gguf",)), ("ollama", ollama, FORMS[2:])):
        if given and to not in fitting:
            raise UserError(f"{name} has no effect with to={to!r}", f"It is for: {', '.join(fitting)}.")
    from mlxtune.ship.export import ship

    folder = None if base is None else Path(base)
    rows = None if data is None else str(data)
    with in_python(EXPORTING):
        of_model, of_adapter = model_and_adapter(model, adapter)
        asked = request(of_model, of_adapter, rows, not verify, base_name, out=Path(out), base=folder, force=force)
        return ship(asked, artefact(to, dtype, type, ollama))


def artefact(target: Form, dtype: str | None, kind: str | None, ollama: bool) -> Artefact:
    """The form that a word of FORMS names, with its options."""
    from mlxtune.ship.artefacts import HuggingFace, Peft
    from mlxtune.ship.gguf import Gguf, GgufAdapter

    forms: dict[Form, Artefact] = {
        "peft": Peft(),
        "hf": HuggingFace(dtype),
        "gguf": Gguf(kind and kind.lower(), ollama),
        "gguf-lora": GgufAdapter(ollama),
    }
    return forms[target]


def request(
    model: str,
    adapter: Path | None,
    data: str | None,
    no_verify: bool,
    base_name: str = "",
    note: Note = to_nobody,
    **to: Any,
) -> Request:
    """What to ship, with the rows for its proof. to: further fields of the request."""
    from mlxtune.machine import backend
    from mlxtune.model import hub
    from mlxtune.model.load import source_of
    from mlxtune.ship.request import Request

    backend.prepare()
    path = hub.resolve(model)
    examples = None if no_verify else for_proof(path, adapter, data, note, or_else="or leave it out: --no-verify")
    is_hub_id = not Path(model).expanduser().exists()
    if not base_name and is_hub_id and source_of(path)["kind"] == "hf":
        base_name = model
    return Request(path, adapter, examples=examples, base_name=base_name, **to)


def for_proof(
    path: Path, adapter: Path | None, data: str | None, note: Note = to_nobody, or_else: str = ""
) -> Sequence[Example]:
    """Rows for a proof: --data's, else the run's own validation rows, or the text that comes with mlxtune where there
    is no adapter. or_else: what the command has beside --data.
    """
    from mlxtune.data.template.tokenizer_changes import tokenizer_of
    from mlxtune.ship import sample
    from mlxtune.ship.good_rows import of_good_answers
    from mlxtune.ship.verify import MAX_POSITIONS, SHIPPED

    if adapter is None and data is None:
        note(f"no adapter, so no rows were held out: the proof is on {SHIPPED} (--data PATH: on your own)")
        return sample.read(tokenizer_of(path, None), MAX_POSITIONS)
    config = tuned.run_settings(adapter, data)
    if not config.data.path and not config.data.sources:
        ways = ["Name some: --data PATH", or_else] if or_else else ["Name some: --data PATH"]
        raise UserError(
            f"the proof needs held-out rows, and {adapter} is no run that names its own", "; ".join(ways) + "."
        )
    rows = tuned.held_out(tokenizer_of(path, adapter), path, adapter, data, note=note, or_else=or_else)[0]
    return of_good_answers(rows)
