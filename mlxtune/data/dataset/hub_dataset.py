"""The splits of a dataset of the hub, through `datasets`; its rows are read as those of a Parquet file are."""

from __future__ import annotations

from typing import Any

from mlxtune.config.schema import SourceSection
from mlxtune.data.rows import arrow
from mlxtune.data.rows.readers import Rows
from mlxtune.errors import UserError


def splits_of(source: SourceSection, stream: bool, local_only: str) -> dict[str, Any]:
    """Split, as the dataset names it -> its rows. The path is OWNER/NAME, or OWNER/NAME:SUBSET.

    stream: read row by row; local_only: as `sources.files_by_split`.
    """
    if local_only:
        return _cached(source, stream, local_only)
    return _loaded(source, stream)


def rows_of(name: str, split: Any, at_once: int) -> Rows:
    """The rows of one split. name: what to call it in messages; at_once: how many are taken out together."""
    number = 0
    for table in split.with_format("arrow").iter(at_once):
        yield from arrow.rows(name, table, number)
        number += len(table)


def _loaded(source: SourceSection, stream: bool) -> Any:
    """Fetched where that is needed. Raises UserError where it cannot be."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    repo, _, subset = source.path.partition(":")
    missing = (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ConnectionError, HfHubHTTPError, ValueError)
    try:
        return datasets.load_dataset(repo, subset or None, streaming=stream)
    except missing as error:
        raise UserError(
            f"{source.path} is neither a local path nor a hub dataset that can be loaded "
            f"({str(error).splitlines()[0]})",
            "Check the name and the network; gated data needs `hf auth login`.",
        ) from error


def _cached(source: SourceSection, stream: bool, hint: str) -> Any:
    """The same from the local cache of `datasets` alone. Raises UserError with the hint where it has no copy."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    datasets.logging.set_verbosity_error()  # it would tell where it found the copy
    repo, _, subset = source.path.partition(":")
    name = repo.partition("/")[2]
    if stream:
        raise UserError(f"{source.path} is a dataset that only the run names, streamed from the hub (data.hub)", hint)
    try:
        # What load_dataset makes of the name when it is offline.
        found = Cache(repo_id=repo, dataset_name=name, config_name=subset or None, version="auto", hash="auto")
        return found.as_dataset()
    except (ValueError, OSError, KeyError, TypeError) as error:  # it has none, several, or a torn one
        raise UserError(
            f"{source.path}, a dataset of the hub that only the run names, is not in the local cache", hint
        ) from error
