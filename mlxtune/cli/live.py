"""The live page of a run: served until Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common


def serve(
    folder: Path,
    others: Sequence[Path],
    evaluations: Sequence[Path],
    with_answers: bool,
    port: int,
    is_opened: bool,
) -> None:
    """Print the page's address and serve it, until a signal ends the command.

    folder, others: of runs; evaluations, with_answers: as `View` takes them; port: 0 for any; is_opened: in the
    browser. Raises UserError for a folder that is no run and where none can begin, and for a port that cannot be had.
    """
    from mlxtune.report.live.fresh import Fresh
    from mlxtune.report.live.server import Server, new_token
    from mlxtune.report.live.view import View
    from mlxtune.report.page import LIVE_POLICY

    token = new_token()
    view = View(folder, others, token, evaluations, with_answers)
    view.require_runs()
    policy = f"{LIVE_POLICY}; frame-ancestors 'none'"
    with Server(port, token, Fresh(view.look, view.page).page, policy, say=common.note) as server:
        if not view.has_begun():
            common.note(f"{shown_name(folder)}: no run has begun here yet; the page will show it as soon as it does")
        click.echo(server.address)
        common.console().print("Follows the run until Ctrl-C, which ends this page and not the run.", style="dim")
        if is_opened and click.launch(server.address) != 0:
            common.note("no browser could be opened: open the address yourself")
        server.serve_forever()
