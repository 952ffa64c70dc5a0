"""Presets for many machines and models at once: what `mlxtune init --show-presets` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlxtune_convert.sizes import size

from mlxtune.machine import backend
from mlxtune.presets import models
from mlxtune.presets.peaks import Peaks
from mlxtune.presets.search import BITS, DoesNotFit, Preset, search
from mlxtune.presets.wanted import MEDIAN, TYPICAL_ROWS, Wanted, typical

if TYPE_CHECKING:
    from rich.console import Console

MEMORIES = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GiB of Macs
WIDE = 110  # columns from which the table has one for each size
AGAIN = {"none": "", 2: ", half again", "all": ", all again", "pieces": ", in pieces", "nested": ", nested"}


@dataclass(frozen=True)
class Cell:
    """One model on one Mac."""

    memory_gib: int  # of the Mac
    size: str  # of the model: 8B
    model: str  # its name
    budget_bytes: int  # that the predicted peak may be
    bits: int | None  # of its weights; None: it does not fit
    settings: dict[str, Any]  # section.key -> value, what differs from the defaults; empty: it does not fit
    peak_bytes: int | None  # predicted; None: it does not fit
    needed_bytes: int | None  # by the settings that need least, where it does not fit
    largest: str  # the largest size that fits, where this one does not; "": none does

    def short(self) -> str:
        """A few words for people."""
        if not self.settings:
            return "-"
        rows, times = self.settings.get("train.batch_rows", 4), self.settings.get("train.accumulate", 1)
        again = AGAIN[self.settings.get("train.checkpoint_layers", "none")]
        return f"{self.bits} bits, {rows}x{times}{again}"

    def line(self) -> str:
        """The whole of it for people."""
        begin = f"{self.memory_gib}-GB Mac, {self.size}: "
        if not self.settings:
            return f"{begin}does not fit; the largest that does: {self.largest or 'none'}"
        assert self.peak_bytes is not None
        tokens = self.settings.get("data.max_tokens", 2048)
        peak = f"{size(self.peak_bytes)} of {size(self.budget_bytes)}"
        return f"{begin}{self.short()}, {tokens:,} tokens, {peak}"


def table(
    memories: Sequence[int] = MEMORIES, sizes: Sequence[str] = models.SIZES, wanted: Wanted | None = None
) -> list[Cell]:
    """The cells, memory by memory. memories: GiB; sizes: of `models.SIZES`; wanted: rows to train on, by default those
    of an imagined data set (`wanted.typical`).
    """
    wanted = wanted or typical()
    found: dict[tuple[int, str], Preset | DoesNotFit] = {}
    for name in sizes:
        known = models.of_size(name)
        peaks = Peaks(known.config, "metal", wanted, known.name)
        for memory in sorted(memories, reverse=True):
            found[memory, name] = search(peaks, backend.mac(memory * backend.GIB), BITS)
    cells = []
    for memory in memories:
        fit = [name for name in sizes if isinstance(found[memory, name], Preset)]
        cells += [_cell(memory, name, found[memory, name], fit[-1] if fit else "") for name in sizes]
    return cells


def _cell(memory: int, name: str, found: Preset | DoesNotFit, largest: str) -> Cell:
    model = models.of_size(name).name
    if isinstance(found, Preset):
        return Cell(
            memory, name, model, found.budget_bytes, found.bits, found.settings, found.peak_bytes, None, largest=""
        )
    return Cell(memory, name, model, found.budget, None, {}, None, found.needed, largest)


def document(cells: Sequence[Cell]) -> dict[str, Any]:
    """For programs."""
    return {"written": models.WRITTEN, "rows": TYPICAL_ROWS, "presets": [asdict(cell) for cell in cells]}


ABOUT = (
    f"For {TYPICAL_ROWS:,} rows, half of them longer than {MEDIAN} tokens. Rows of a micro-batch x micro-batches of an "
    "optimizer step; again: blocks computed again in the backward pass, for want of memory. At most 80% of what macOS "
    "recommends for the GPU is used: two thirds of the memory up to 32 GB, three quarters above."
)


def draw(out: Console, cells: Sequence[Cell]) -> None:
    """Print the cells: a table where the terminal has room for it, else a line each."""
    from rich.table import Table
    from rich.text import Text

    out.print(Text(ABOUT, style="dim"))
    sizes = list(dict.fromkeys(cell.size for cell in cells))
    if out.soft_wrap or out.width < WIDE:
        for cell in cells:
            out.print(cell.line())
        return
    shown = Table("", *sizes)
    for memory in dict.fromkeys(cell.memory_gib for cell in cells):
        shown.add_row(f"{memory}-GB Mac", *(cell.short() for cell in cells if cell.memory_gib == memory))
    out.print(shown)
