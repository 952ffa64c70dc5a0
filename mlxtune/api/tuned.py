"""What is opened of a run: its settings, its model, and the rows to compare on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.api.tuning import Run
    from mlxtune.config.resolve import Config
    from mlxtune.data.dataset.examples import Examples
    from mlxtune.model.load import Loaded

Note = Callable[[str], None]  # hears what a person must know beside the result


def to_nobody(text: str) -> None:
    """For whoever wants no notes."""


def folder_of(given: Run | str | Path, what: str = "adapter") -> Path:
    """Where a run, or an adapter, is. what: the argument, for the message. Raises UserError for what is neither."""
    if isinstance(given, str | Path):
        return Path(given)
    folder = getattr(given, "folder", None)
    if isinstance(folder, Path):
        return folder
    raise UserError(f"{what}: expected a run, a folder or a name, got {given!r}", "Name one, as a text or a Path.")


def model_and_run(given: Run | str | Path) -> tuple[str, Path | None]:
    """(The model that a caller names; the run's folder where it was named by its run, or by that folder)."""
    from mlxtune.train.run_folder import RunFolder

    if not isinstance(given, str | Path):
        folder = folder_of(given, "model")
        return given.model, folder
    folder = Path(given).expanduser()
    is_model = (folder / "config.json").is_file()
    run = RunFolder(folder)
    if is_model or not run.is_run():
        return str(given), None
    return run.config().model.path, folder


def run_settings(adapter: Path | None, data: str | None, settings: tuple[str, ...] = ()) -> Config:
    """The configuration a run was made with (defaults without one), its data replaced by --data."""
    from mlxtune.config import resolve
    from mlxtune.train.run_folder import RunFolder

    flags = {"data.path": data}
    if adapter is not None and RunFolder(adapter).is_run():
        return RunFolder(adapter).config(None, settings, flags)
    return resolve.load(None, settings, flags)


def held_out(
    tokenizer: Any,
    folder: Path,
    adapter: Path | None,
    data: str | None,
    settings: tuple[str, ...] = (),
    split: str | None = None,
    note: Note = to_nobody,
    or_else: str = "",
) -> tuple[Examples, Config]:
    """(The rows to compare on: --data's, else the run's own; the configuration they are read with). The hub is not
    asked for rows that the run's folder alone names.

    tokenizer, folder, split: as `evaluate.held_out` takes them. or_else: what to do where the run's own rows are gone
    and nobody knows where to, beside naming others.
    """
    from mlxtune.data.dataset.sources import is_hub_id
    from mlxtune.evaluate import held_out
    from mlxtune.train import reach
    from mlxtune.train.run_folder import RunFolder

    config = run_settings(adapter, data, settings)
    if adapter is None or not RunFolder(adapter).is_run():
        return held_out.held_out(tokenizer, folder, config, split, own=data is None), config
    named = reach.keys_named(settings, {"data.path": data})
    for line in reach.cache_notes(config, str(RunFolder(adapter).config_file), named):
        note(line)
    local_only = reach.compared(config.data) if named.isdisjoint(reach.DATA_KEYS) else ""
    # Who names the run's own dataset, to have it fetched, means the rows that the run held out of it.
    is_runs_own = is_hub_id(config.data.path) and data == run_settings(adapter, None).data.path
    own = data is None or is_runs_own
    try:
        return held_out.held_out(tokenizer, folder, config, split, own, local_only), config
    except UserError as error:
        if data is not None or error.hint:
            raise
        where = f"{adapter} was trained on it; if it is elsewhere now, name it: --data PATH"
        raise UserError(error.message, f"{where}; {or_else}." if or_else else f"{where}.") from None


def load_model(model: str, adapter: Path | None) -> Loaded:
    """The model, with the adapter on it and the chat template that it was tuned with."""
    from mlxtune_convert.adapters import AdapterConfig

    from mlxtune.adapter import adapter_files
    from mlxtune.data.template.tokenizer_changes import Changes
    from mlxtune.model import load

    if adapter is None:
        return load.load(model)
    AdapterConfig.read(adapter)  # a wrong folder is said before the model is read
    loaded = load.load(model)
    Changes.read(adapter).apply(loaded.tokenizer, loaded.path)
    adapter_files.load_adapter(loaded.model, adapter, loaded.config)
    return loaded
