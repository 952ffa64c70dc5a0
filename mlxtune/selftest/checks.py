"""All checks in their order, and how one is done."""

from __future__ import annotations

import time

from mlxtune.errors import Interrupted, UserError
from mlxtune.selftest import kernels, runs, shipping, timing, ways
from mlxtune.selftest.outcome import FAILED, NOT_HERE, Check, NotHere, Result, Workshop


def every() -> list[Check]:
    return [*kernels.checks(), *ways.checks(), *runs.checks(), *shipping.checks(), *timing.checks()]


def done(check: Check, shop: Workshop) -> Result:
    """The result, whatever the check raises but a signal."""
    began = time.perf_counter()
    try:
        found = check.run(shop)
    except NotHere as reason:
        return Result(check.group, check.name, NOT_HERE, said=str(reason))
    except Interrupted:
        raise
    except Exception as error:  # a wrong machine may raise anything
        said = (str(error).splitlines() or [""])[0]
        if not isinstance(error, UserError):
            said = f"{type(error).__name__}: {said}"
        return Result(check.group, check.name, FAILED, said=said, seconds=time.perf_counter() - began)
    said = found.wrong or found.said
    seconds = time.perf_counter() - began
    return Result(check.group, check.name, found.status, found.value, found.limit, found.unit, said, seconds)
