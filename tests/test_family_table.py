"""The table of model families: all of a family stands in it once, and names lead there and back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mlxtune_convert.errors import UserError
from mlxtune_convert.families import table
from mlxtune_convert.gguf.architectures import FAMILIES
from mlxtune_convert.gguf.family import DENSE
from mlxtune_convert.gguf.family import table as changed
from mlxtune_convert.gguf.tensor_name import TensorName


def test_each_family_stands_in_one_module_under_its_own_name() -> None:
    names = [name for module in table.MODULES for name in module.FAMILIES]
    assert len(names) == len(set(names)) == len(table.FAMILIES) > 90
    for name, family in table.FAMILIES.items():
        if family.gguf is not None:
            assert family.gguf.model_type == name
        if family.text_of:
            assert family.text_of in table.FAMILIES
        assert not (family.hf and family.not_exported), name


def test_no_module_makes_an_exception_of_a_family_outside_of_the_table() -> None:
    """Nobody compares a model_type, or llama.cpp's word for one, with a name: whoever differs says so in its entry."""
    package = Path(table.__file__).parents[1]
    known = set(table.FAMILIES) | {family.gguf for family in FAMILIES}
    compared = []
    files = [path for path in package.rglob("*.py") if path.parent.name != "families"]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and _asks_for_a_family(node):
                words = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                compared += [f"{path.name}:{node.lineno}"] if words & known else []
    assert len(files) > 50
    assert not compared


def _asks_for_a_family(node: ast.Compare) -> bool:
    text = ast.unparse(node)
    return "model_type" in text or "family.gguf" in text


def test_an_unknown_family_has_an_empty_entry() -> None:
    assert table.family_of({"model_type": "no such family"}) == table.ModelFamily() == table.family_of({})


def test_a_table_as_text_adds_replaces_and_takes_out_entries() -> None:
    assert changed("b=2 a=3 -c", {"a": "1", "c": "1"}) == {"a": "3", "b": "2"}
    with pytest.raises(KeyError):
        changed("-ffn_gat", DENSE)  # a slip of the pen is no silence


@pytest.mark.parametrize(
    "name, block, stem, suffix",
    [
        ("blk.3.attn_q.weight", 3, "attn_q", "weight"),
        ("blk.12.shortconv.conv.weight", 12, "shortconv.conv", "weight"),
        ("blk.7.ssm_a", 7, "ssm_a", ""),
        ("output_norm.weight", None, "output_norm", "weight"),
        ("blk.01.attn_q.weight", None, "blk.01.attn_q", "weight"),  # or it would be one tensor with blk.1
        ("", None, "", ""),
    ],
)
def test_a_tensor_name_is_its_block_its_stem_and_its_suffix(
    name: str, block: int | None, stem: str, suffix: str
) -> None:
    found = TensorName.of(name)
    assert (found.block, found.stem, found.suffix) == (block, stem, suffix)
    assert str(found) == name


def test_every_name_of_every_family_leads_there_and_back() -> None:
    count = 0
    for family in FAMILIES:
        stems = {f"blk.5.{stem}": f"model.layers.5.{name}" for stem, name in family.names.items()} | family.outer
        for stem, name in stems.items():
            own_parameter = name.endswith(".sinks")  # has no suffix in MLX
            ours = name if own_parameter else f"{name}.weight"
            assert family.gguf_name(ours) == f"{stem}.weight"
            assert family.mlx_name(f"{stem}.weight") == ours
            count += 1
        with pytest.raises(UserError, match="not one of"):
            family.mlx_name("blk.05.attn_q.weight")
    assert count > 500
