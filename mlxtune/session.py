"""One run from configuration to adapter: what `mlxtune train` and the demo do."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlxtune_convert.files import explained

from mlxtune import backend
from mlxtune.config import Config
from mlxtune.config import load as load_config
from mlxtune.data import chat, mixture, sources
from mlxtune.data.batches import Batch, Plan, in_order
from mlxtune.data.mixture import Examples
from mlxtune.data.template import BUILT_IN
from mlxtune.data.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.evaluate.loss import Score, score
from mlxtune.model import hub, lora, vocabulary
from mlxtune.model.arrays import dtype_name
from mlxtune.model.dropout import add_noise
from mlxtune.model.head import Split
from mlxtune.model.load import Loaded, cast, load, model_dtype, open_model
from mlxtune.model.memory import Memory
from mlxtune.train import checkpoint, fast, fit, loop
from mlxtune.train.checkpoint import State
from mlxtune.train.display import Display
from mlxtune.train.events import Events

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Data:
    """The examples of a run: training and held-out, with what was shortened or dropped."""

    train: Examples
    valid: Examples

    def digest(self) -> str:
        """What the model is trained and scored on: changes when any token or mask does."""
        return f"{self.train.digest()}-{self.valid.digest()}"


def read_data(config: Config, progress: mixture.Progress = lambda source, rows: None) -> tuple[Data, Config]:
    """Rows -> examples of the model's tokenizer, and the configuration with the day they were made for.

    Raises UserError before any weight is read; for a typing error in the rows, before a model is downloaded.
    """
    sources.glance(config.data, whole=not Path(config.model.path).expanduser().exists())
    folder = hub.resolve(config.model.path)
    tokenizer = load_tokenizer(folder)
    config = dated(config, folder, tokenizer)
    found = mixture.read(config.data, tokenizer, folder, config.train.seed, progress)
    return Data(found["train"], found["valid"]), config


def split_for(loaded: Loaded, config: Config, batch: Batch) -> Split | None:
    """The proven head split, or None when `fast.head` is off or the model's own logits are not reproduced."""
    if config.fast.head == "off":
        return None
    return Split.of(loaded.model, mx.array(batch.ids[:1, : min(64, batch.ids.shape[1])]))


def memory_plan(config: Config, data: Data) -> tuple[Config, Memory | None, list[str]]:
    """(the configuration made to fit, its predicted memory, notes) of a run, without reading a weight. Memory None: the
    model is of a kind that cannot be predicted.
    """
    backend.prepare()
    model, model_config = open_model(hub.resolve(config.model.path))
    dtype = backend.dtype_for(config.train.dtype, model_dtype(model), "quantization" in model_config)
    cast(model, dtype)
    lora.attach(model, lora.Spec.of(model, config.lora), config.train.seed)
    plan = Plan(data.train, config.train, config.data.group_by_prefix)
    config, plan, notes = fit.fitted(model, config, model_config, dtype, plan)
    return config, fit.plan(model, config, model_config, dtype, plan), notes


def anchored(config: Config) -> Config:
    """Local paths made absolute, so that the run can be used and resumed from any folder. Hub ids stay."""

    def absolute(path: str) -> str:
        local = Path(path).expanduser()
        return str(local.resolve()) if path and local.exists() else path

    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    parts = [source.model_copy(update={"path": absolute(source.path)}) for source in config.data.sources or []]
    data = config.data.model_copy(
        update={
            "path": absolute(config.data.path),
            "sources": parts or None,
            "template": config.data.template if config.data.template in BUILT_IN else absolute(config.data.template),
        }
    )
    tuned = config.lora.model_copy(update={"start_from": absolute(config.lora.start_from)})
    return config.model_copy(update={"model": model, "data": data, "lora": tuned})


def dated(config: Config, folder: Path, tokenizer: Any) -> Config:
    """The day made explicit where the template prints it, so that the run means the same tomorrow."""
    vocabulary.choose(tokenizer, folder, config)
    if config.data.date or tokenizer.chat_template is None or not chat.template_of(tokenizer, {}).prints_date:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"date": date.today().isoformat()})})


def default_out(model: str) -> Path:
    """runs/<date>-<model>, numbered when it exists."""
    stem = f"{date.today().isoformat()}-{Path(model).name}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for name in names if not (path := Path("runs") / name).exists())


def tune(config: Config, out: Path, display: Display, resume: bool = False) -> State:
    """Train and leave the adapter in `out`.

    Raises UserError for anything wrong with the configuration, data or model, Interrupted after a signal. A run that
    ends before anything was saved leaves no folder.
    """
    config = anchored(config)
    if out.exists() and not resume and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists", "Choose another --out, or continue that run with --resume.")
    fast.refuse_idle(config)
    data, config = read_data(config, display.reading)
    loaded = load(config.model.path, config.train.dtype)
    changes = vocabulary.prepare(loaded, config)
    loaded.check_ids([[data.train.highest, data.valid.highest]])
    spec = spec_for(config, loaded, out if resume else None)
    valid = in_order(data.valid)
    dropout = lora.attach(loaded.model, spec, config.train.seed)
    if config.lora.start_from and not resume:
        lora.load_factors(loaded.model, Path(config.lora.start_from) / spec.file)
    if config.train.neftune_alpha:
        dropout.noise_alpha = config.train.neftune_alpha
        add_noise(loaded.model, dropout)
    plan = Plan(data.train, config.train, config.data.group_by_prefix)
    config, plan, fit_notes = fit.fitted(loaded.model, config, loaded.config, loaded.dtype, plan)
    path, path_notes = fast.choose(loaded.model, data.train, config, loaded.dtype)
    job = loop.Job(
        model=loaded.model,
        path=path,
        dropout=dropout,
        plan=plan,
        section=config.train,
        run=out,
        evaluate=lambda: score(loaded.model, path.split, valid),
        place=data.train.place,
        data=data.digest(),
        adapter_file=spec.file,
    )
    notes = data.train.notes("train", config.data.max_tokens) + data.valid.notes("valid", config.data.max_tokens)
    notes += fit_notes + path_notes
    if data.train.chat and not chat.template_of(loaded.tokenizer, config.data.template_kwargs).end_of_turn:
        notes.append("the chat template ends answers with no token of its own: the model will not learn where to stop")
    if config.lora.start_from:
        notes.append(f"going on from {config.lora.start_from}: its kind, ranks, scales and targets are kept")
    notes.append(f"{len(data.train)} training rows, {len(data.valid)} held out, {plan.steps} steps")
    notes.append(f"training {lora.describe(spec, loaded.model)} on {backend.kind()}, {dtype_name(loaded.dtype)}")
    notes.append(f"computed: {fast.describe(path)}")
    with explained(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not resume:
                lora.save_config(out, spec)
                changes.save(out)
                (out / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
            with contextlib.closing(Events(out, display)) as events:
                for note in notes:
                    events.emit("note", text=note)
                display.begin(plan.steps)
                mx.reset_peak_memory()
                return loop.run(job, events, resume)
        except BaseException:
            if not resume and not checkpoint.saved(out):
                shutil.rmtree(out, ignore_errors=True)
            raise


def spec_for(config: Config, loaded: Loaded, run: Path | None) -> lora.Spec:
    """What trains: as a resumed run began, as the adapter to start from is, else as configured."""
    if run is not None:
        return lora.read_spec(run)
    if not config.lora.start_from:
        return lora.Spec.of(loaded.model, config.lora)
    start = Path(config.lora.start_from)
    spec = lora.read_spec(start)
    if lora.adapter_file(start) is None:
        raise UserError(f"{start} has no {spec.file}")
    layers = len(loaded.model.layers)
    return replace(spec, dropout=config.lora.dropout, num_layers=spec.num_layers if spec.num_layers > 0 else layers)


def run_config(run: Path) -> Config:
    """The resolved configuration a run was made with. Raises UserError when the folder is no run."""
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not a run of mlxtune (no {CONFIG_FILE})")
    return load_config(run / CONFIG_FILE)


def held_out(tokenizer: Any, folder: Path, config: Config, split: str | None = None, own: bool = True) -> Examples:
    """The examples to compare on; `folder` names the model in errors.

    own: the data is the run's own, of which the validation rows (or `split`) were held out; else the user named it, and
    a single file counts whole.
    """
    whole = not own and split is None and Path(config.data.path).expanduser().is_file()
    wanted = split or ("train" if whole else "valid")
    section = config.data if own else config.data.model_copy(update={"dedup": "none", "cap": None})
    found = mixture.read(section, tokenizer, folder, config.train.seed, whole=whole)
    if wanted not in found:
        raise UserError(f"{config.data.path} has no {wanted} split", f"It has: {', '.join(found)}.")
    return found[wanted]


def evaluate(loaded: Loaded, config: Config, examples: Examples) -> Score:
    loaded.check_ids([[examples.highest]])
    batches = in_order(examples)
    return score(loaded.model, split_for(loaded, config, batches[-1]), batches)
