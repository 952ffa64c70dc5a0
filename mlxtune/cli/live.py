"""The live page of a run: served until Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common


def serve(folder: Path, others: Sequence[Path], evaluations: Callable[[Any], Any], port: int, is_opened: bool) -> None:
    """Print the page's address and serve it, until a signal ends the command.

    folder, others: of runs; evaluations: of a run that was read; port: 0 for any; is_opened: in the browser. Raises
    UserError for a folder that is no run and where none can begin, and for a port that cannot be had.
    """
    from mlxtune.report.live.fresh import Fresh
    from mlxtune.report.live.server import Server, new_token
    from mlxtune.report.live.view import View
    from mlxtune.report.page import LIVE_POLICY

    token = new_token()
    view = View(folder, others, evaluations, token)
    view.require_run_or_place()
    with Server(port, token, Fresh(view.look, view.page).page, f"{LIVE_POLICY}; frame-ancestors 'none'") as server:
        if not view.has_begun():
            common.note(f"{shown_name(folder)}: no run has begun here yet; the page will show it as soon as it does")
        click.echo(server.address)
        common.console().print("Follows the run until Ctrl-C, which ends this page and not the run.", style="dim")
        if is_opened:
            click.launch(server.address)
        server.serve_forever()
