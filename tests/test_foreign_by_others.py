"""What the formats' own authors pack and read: compressed-tensors, bitsandbytes, gptqmodel, AutoAWQ (see
tests/foreign_by_others.py, which made the committed file), and transformers' fp8 and MXFP4 modules, run here.
"""

from __future__ import annotations

from pathlib import Path

import foreign
import foreign_by_others
import numpy as np
import pytest
import torch
from test_foreign_formats import opened

CASES = foreign_by_others.cases()
# What the author's own reading rounds to: the type it computes in.
ROUNDING = {"compressed nvfp4": 2.0**-8, "compressed mxfp4": 2.0**-8, "bitsandbytes int8": 2.0**-11}


@pytest.mark.parametrize("case", CASES)
def test_the_authors_own_reading_is_ours(case: str, tmp_path: Path) -> None:
    one = CASES[case]
    (part,) = opened(foreign.written(tmp_path / "m", one.tensors, one.settings)).found.parts
    assert part.name == f"{foreign_by_others.MODULE}.weight"
    tolerance = ROUNDING.get(case, 1e-6)
    np.testing.assert_allclose(part.dense(np.dtype(np.float32)), one.means, rtol=tolerance, atol=1e-9)


def test_every_author_is_heard() -> None:
    assert {name.split()[0] for name in CASES} == {"compressed", "bitsandbytes", "gptq", "awq"}
    assert len(CASES) == 21


@pytest.mark.parametrize("block", [(32, 64), None])
def test_transformers_fp8_is_ours(block: tuple[int, int] | None, tmp_path: Path) -> None:
    """Its own quantizer and dequantizer: blocks, and one scale for all."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    settings = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt="float"))
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    tensors = Fp8Quantize(quantizer).convert({"a.weight": weight})
    means = Fp8Dequantize(quantizer)._dequantize_one(tensors["a.weight"], tensors["a.weight_scale_inv"], torch.float32)
    (part,) = opened(foreign.written(tmp_path / "m", tensors, settings)).found.parts
    np.testing.assert_array_equal(part.dense(np.dtype(np.float32)), means.numpy())
    assert (means - weight).abs().max() < weight.abs().max() / 16


def test_transformers_mxfp4_is_ours(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 32, 4, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(110, 130, (3, 32, 4), dtype=torch.uint8, generator=draw)
    means = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    tensors = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}
    (part,) = opened(foreign.written(tmp_path / "m", tensors, {"quant_method": "mxfp4"})).found.parts
    np.testing.assert_array_equal(part.dense(np.dtype(np.float32)), means.numpy())
