"""The process that does the checks: `python -m mlxtune.selftest FOLDER N` does those from number N on, in FOLDER.

It prints a JSON line when it begins a check and one when that is done, or one when FOLDER takes nothing more; whoever
started it reads them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from mlxtune.errors import Interrupted
from mlxtune.machine import backend
from mlxtune.selftest import checks
from mlxtune.selftest.outcome import NoRoom, Workshop
from mlxtune.train import signals


def main(folder: Path, first: int) -> None:
    signals.unwind_on_signals()
    backend.prepare()
    shop, every = Workshop(folder), checks.every()
    for number, check in enumerate(every[first:], first):
        print(json.dumps({"begun": number, "of": len(every), "group": check.group, "name": check.name}), flush=True)
        try:
            result = checks.done(check, shop)
        except NoRoom as refused:
            print(json.dumps({"refused": refused.number}), flush=True)
            return
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except Interrupted as stopped:  # in a run of training
        sys.exit(stopped.exit_code)
