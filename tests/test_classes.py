"""Modules of other classes for a while: what calls them sees the other call, what saves them sees nothing."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune.model.arrays import named
from mlxtune.model.classes import as_classes, calling


def doubled(kind: type) -> type:
    def call(self: Any, *args: Any) -> Any:
        return 2 * kind.__call__(self, *args)

    return calling(kind, call, factor=2)


def test_a_module_computes_something_else_inside_and_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    x = mx.ones((1, 4))
    before, names = model(x), list(named(model.parameters()))
    last: Any = model.layers[1]
    with as_classes([(last, doubled(type(last)))]):
        assert mx.allclose(model(x), 2 * before)
        assert isinstance(last, nn.Linear) and type(last).__name__ == "Linear" and last.factor == 2
        assert list(named(model.parameters())) == names
    assert mx.array_equal(model(x), before)


def test_a_module_that_comes_twice_is_its_first_self_again_where_something_fails() -> None:
    """As a block does that a model calls at two places."""
    layer = nn.Linear(4, 3)
    once, again = doubled(nn.Linear), doubled(nn.Linear)
    with pytest.raises(ValueError, match="within"), as_classes([(layer, once), (layer, again)]):
        assert type(layer) is again
        raise ValueError("within")
    assert type(layer) is nn.Linear
