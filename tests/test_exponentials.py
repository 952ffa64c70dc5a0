"""Exponentials as powers of two against float64 (NumPy), attention against MLX's own in float64."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune.model import linux_cpu as powers

X = np.concatenate([np.linspace(-30, 30, 20001), [-200, 0, 200, -np.inf, np.inf, np.nan]]).astype(np.float32)


def test_exponentials_round_as_well_as_those_of_mlx() -> None:
    with np.errstate(over="ignore"):
        wanted = np.exp(X.astype(np.float64)).astype(np.float32)
    got = np.array(powers.exp(mx.array(X)))
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    near = np.abs(X) <= 8
    np.testing.assert_allclose(got[near], wanted[near], rtol=6e-7)


def test_sigmoids_and_their_slopes_are_right_from_one_end_to_the_other() -> None:
    with np.errstate(over="ignore"):
        wanted = 1 / (1 + np.exp(-X.astype(np.float64)))
    finite = np.isfinite(X)
    np.testing.assert_allclose(np.array(powers.sigmoid(mx.array(X))), wanted, rtol=2e-6, atol=1e-38)
    slopes = np.array(mx.grad(lambda x: powers.sigmoid(x).sum())(mx.array(X[finite])))
    np.testing.assert_allclose(slopes, (wanted * (1 - wanted))[finite], atol=1e-7)


def masks(queries: int, keys: int) -> dict[str, object]:
    places = mx.arange(keys - queries, keys)[:, None] - mx.arange(keys)[None]
    return {
        "none": None,
        "causal": "causal",
        "window": (places >= 0) & (places < 5),
        "of rows": mx.broadcast_to((places >= 0)[None, None], (2, 1, queries, keys)),
    }


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (9, 21), (1, 12)])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "of rows"])
def test_attention_and_its_gradients_are_those_of_mlx(
    heads: int, groups: int, queries: int, keys: int, mask: str
) -> None:
    """Values narrower than keys, as in multi-head latent attention."""
    shapes = [(2, heads, queries, 16), (2, groups, keys, 16), (2, groups, keys, 12), (2, heads, queries, 12)]
    q, k, v, w = (2 * mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    given = masks(queries, keys)[mask]

    def run(attention: object, *arrays: mx.array, mask: object) -> tuple[mx.array, list[mx.array]]:
        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (attention(q, k, v, scale=0.3, mask=mask) * w).sum()  # type: ignore[operator]

        value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
        return value, list(gradients)

    value, got = run(powers.attention, q, k, v, mask=given)
    expected, wanted = run(powers.mlx_attention, *(a.astype(mx.float64) for a in (q, k, v)), mask=given)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5 * max(1.0, mx.abs(other).max().item()))


def test_few_queries_over_many_keys_make_no_square_of_the_keys() -> None:
    """A branch behind a long trunk: [T, S] for its own tokens. The square would be 67 MB, and stay for good."""
    q = mx.random.normal((1, 2, 20, 8), key=mx.random.key(1))
    k = mx.random.normal((1, 2, 4096, 8), key=mx.random.key(2))
    wanted = powers.mlx_attention(q, k, k, scale=0.3, mask="causal")
    mx.eval(wanted)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    got = powers.attention(q, k, k, scale=0.3, mask="causal")
    np.testing.assert_allclose(np.array(got), np.array(wanted), atol=1e-6)
    assert mx.get_peak_memory() - before < 20 * 4096 * 4 * 10  # some times the scores, 2 heads of them
    assert all(len(square) <= powers.SQUARE for square in powers._squares)


def test_a_row_of_padding_without_any_key_stays_finite() -> None:
    x = mx.random.normal((1, 2, 3, 8), key=mx.random.key(1))
    mask = mx.array([[True, False, False], [False] * 3, [True] * 3])
    np.testing.assert_allclose(
        np.array(powers.attention(x, x, x, scale=1.0, mask=mask)),
        np.array(powers.mlx_attention(x, x, x, scale=1.0, mask=mask)),
        atol=1e-6,
    )


def test_a_mask_of_numbers_gets_its_gradient() -> None:
    """In multi-head latent attention it holds the part of the scores that positions make."""
    x, mask = (mx.random.normal(shape, key=mx.random.key(2)) for shape in ((1, 2, 3, 8), (1, 2, 3, 3)))
    of_mask = mx.grad(lambda mask: mx.square(powers.attention(x, x, x, scale=1.0, mask=mask)).sum())(mask)
    wanted = mx.grad(lambda mask: mx.square(powers.mlx_attention(x, x, x, scale=1.0, mask=mask)).sum())(mask)
    assert mx.abs(wanted).max().item() > 0.01
    np.testing.assert_allclose(np.array(of_mask), np.array(wanted), atol=1e-6)


def test_models_use_them_inside_the_context_only_and_other_types_never() -> None:
    x = mx.array([1.0, -2.0])
    before = mx.exp, mx.sigmoid, mx.fast.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), powers.as_powers_of_two():
        assert (mx.exp, mx.sigmoid, mx.fast.scaled_dot_product_attention) == (
            powers.exp,
            powers.sigmoid,
            powers.attention,
        )
        assert nn.silu(x)[0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)
        assert mx.exp(1.0).item() == pytest.approx(math.e, rel=1e-6)  # type: ignore[arg-type]
        assert mx.exp(x.astype(mx.float64)).dtype == mx.float64
        assert mx.sigmoid(x.astype(mx.bfloat16)).dtype == mx.bfloat16
        raise ZeroDivisionError
    assert (mx.exp, mx.sigmoid, mx.fast.scaled_dot_product_attention) == before
    with powers.as_powers_of_two(False):
        assert mx.exp is before[0]
