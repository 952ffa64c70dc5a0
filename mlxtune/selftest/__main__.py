"""The process that does the checks: `python -m mlxtune.selftest FOLDER N` does those from number N on, in FOLDER.

It prints a JSON line when it begins a check and one when that is done; whoever started it reads them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from mlxtune import backend
from mlxtune.errors import Interrupted
from mlxtune.selftest import checks
from mlxtune.selftest.outcome import Workshop
from mlxtune.train import signals


def main(folder: Path, first: int) -> None:
    signals.unwind_on_signals()
    backend.prepare()
    shop = Workshop(folder)
    for number, check in enumerate(checks.every()):
        if number >= first:
            print(json.dumps({"begun": number, "group": check.group, "name": check.name}), flush=True)
            print(json.dumps(asdict(checks.done(check, shop))), flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except Interrupted as stopped:  # in a run of training
        sys.exit(stopped.exit_code)
