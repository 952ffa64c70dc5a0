"""The gated delta rule in chunks: what Qwen3.5, Qwen3-Next, Kimi and OLMo hybrid have in place of most attention.

Such a layer keeps a matrix S for each head. A token first lets it fade (g), then corrects what S answers to its key k
towards its value v, as far as beta says, and asks it with its query q (Yang et al. 2024, arXiv:2412.06464, eq. 10):

    S_t = g_t S_(t-1) + delta_t k_t^T       delta_t = beta_t (v_t - g_t S_(t-1) k_t)       y_t = S_t q_t

In training mlx-lm computes it token by token, and the gradient keeps several matrices [width, width] of every token: of
512 tokens with 32 heads of 128, 4.3 GB a layer. Here a chunk of C tokens is computed at once, as the authors do for
their kernels (ibid., section 3.3), and one matrix a chunk is kept. Let G_t be the product of g from the chunk's
beginning to t. Then every delta of a chunk is a sum over those before it, which is a triangular system:

    (I + L) delta = beta (v - G (S_0 k))    L_tj = beta_t (k_t . k_j) G_t / G_j   for j < t, else 0
    y_t           = G_t (S_0 q_t) + sum over j <= t of (q_t . k_j) G_t / G_j delta_j
    S_C           = G_C S_0 + sum over j of G_C / G_j delta_j k_j^T

Two tokens, S_0 = 0, one number a head, k = (1, 1), v = (2, 3), beta = (1, 1), g = (1, 0.5):

    token by token    delta_1 = 2, S_1 = 2;  delta_2 = 3 - 0.5 * 2 = 2, S_2 = 0.5 * 2 + 2 = 3
    as a chunk        L_21 = 1 * 1 * 0.5, so delta_1 = 2, delta_2 = 3 - 0.5 * delta_1 = 2;  S_2 = 0.5 * 2 + 1 * 2 = 3

A ratio G_t / G_j is the exponential of a difference of sums of logarithms, never larger than 1: dividing the products
would divide by numbers that are 0 in float32.

On Metal MLX has kernels for some shapes (`by_kernel`), which keep no matrix at all between the passes.

Legend: B rows, T tokens, K key heads, H value heads, D width of a key, V of a value, C tokens of a chunk, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta as of_mlx_lm

from mlxtune.machine import backend
from mlxtune.model.functions import finds_any, in_place_of

CHUNK = 16  # C: of 16, 32 and 64 the fastest and the leanest on the CPU; and a proof on 32 tokens passes a border

FEW = 4  # tokens whose ratios are written out where g is a vector

# MLX's kernels, as they are named in the metallib of 0.32.4: heads of keys and of values, all of this width.
KERNEL_HEADS = frozenset([(16, 16), (16, 32), (16, 48), (16, 64), (24, 24), (32, 32)])
KERNEL_WIDTH = 128

Result = tuple[mx.array, mx.array]  # y [B, T, H, V], the last S [B, H, V, D]
Update = Callable[..., Result]

mlx_lm_update: Update = of_mlx_lm.gated_delta_update


def is_in(model: nn.Module) -> bool:
    """Whether a model has layers that compute the gated delta rule by mlx-lm's function."""
    return finds_any(model, {mlx_lm_update: in_chunks})


@contextmanager
def computed_in_chunks(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers compute it in chunks."""
    with in_place_of(model, {mlx_lm_update: in_chunks}):
        yield


@contextmanager
def computed_by_kernel(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers compute it by MLX's kernel where there is one, else as they did outside."""
    others = {mlx_lm_update: _kernel_or(mlx_lm_update), in_chunks: _kernel_or(in_chunks)}
    with in_place_of(model, others):
        yield


def in_chunks(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    **options: Any,
) -> Result:
    """As mlx-lm's `gated_delta_update`, which defines the arguments: q, k [B, T, K, D], v [B, T, H, V], a [B, T, H] or
    [B, T, H, D], b [B, T, H], state [B, H, V, D], mask [B, T] of padding, which is left to mlx-lm.
    """
    if mask is not None:
        return mlx_lm_update(q, k, v, a, b, A_log, dt_bias, state, mask, **options)
    decays, beta = _gates(a, b, A_log, dt_bias, **options)
    if state is None:
        state = _no_state(q, v)
    return chunked(q, k, v, decays, beta, state)


def _kernel_or(otherwise: Update) -> Update:
    """MLX's kernel where there is one, else a function with mlx-lm's arguments (see `in_chunks`)."""

    def update(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        A_log: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        **options: Any,
    ) -> Result:
        if mask is not None or not has_kernel(q, v, a):
            return otherwise(q, k, v, a, b, A_log, dt_bias, state, mask, **options)
        decays, beta = _gates(a, b, A_log, dt_bias, **options)
        if state is None:
            state = _no_state(q, v)
        # The kernel reads the gates in the type of q, and 0.998 is 1.0 in bfloat16: 1% of the result in 40 tokens.
        gates, beta = _wide(mx.exp(decays)), _wide(beta)
        y, last = mx.fast.gated_delta_update(_wide(q), _wide(k), _wide(v), gates, beta, state)
        return y.astype(q.dtype), last

    return update


def has_kernel(q: mx.array, v: mx.array, a: mx.array) -> bool:
    """Whether MLX has a kernel with a gradient for queries q [B, T, K, D], values v [B, T, H, V] and gates like a."""
    if backend.kind() != "metal" or not hasattr(mx.fast, "gated_delta_update"):
        return False
    heads = (q.shape[2], v.shape[2])
    scalar_gates = a.ndim == 3
    return scalar_gates and heads in KERNEL_HEADS and q.shape[3] == KERNEL_WIDTH == v.shape[3]


def _gates(
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """(logarithms of g, of a's shape; beta [B, T, H]), as mlx-lm's `gated_delta_update` makes g and beta of its
    arguments. use_kernel: of mlx-lm's kernel, which has no gradient.
    """
    beta = mx.sigmoid(b)
    if allow_neg_eigval:
        beta = beta * 2.0
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        softplus: mx.array = nn.softplus(a + dt_bias)
        return -rate * softplus, beta
    return lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias)), beta


def _no_state(q: mx.array, v: mx.array) -> mx.array:
    rows, heads, width = v.shape[0], v.shape[2], v.shape[3]
    return mx.zeros((rows, heads, width, q.shape[3]), mx.float32)


def _wide(array: mx.array) -> mx.array:
    """In float32, where states are kept; float64 (a test's oracle) stays."""
    return array if array.dtype == mx.float64 else array.astype(mx.float32)


def chunked(q: mx.array, k: mx.array, v: mx.array, decays: mx.array, beta: mx.array, state: mx.array) -> Result:
    """The rule of this module's head. q, k [B, T, K, D], v [B, T, H, V], decays [B, T, H] or [B, T, H, D] logarithms of
    g, beta [B, T, H], state [B, H, V, D].
    """
    dtype, tokens = q.dtype, q.shape[1]
    if decays.ndim == 3:
        decays = decays[..., None]
    queries_per_key = v.shape[2] // k.shape[2]
    if queries_per_key > 1:
        q, k = mx.repeat(q, queries_per_key, -2), mx.repeat(k, queries_per_key, -2)
    # Each [N, B, H, C, width]. The tokens that fill up the last chunk have k = 0 and g = 1: they leave S as it is.
    q, k, v, decays, beta = (_in_pieces(_wide(array)) for array in (q, k, v, decays, beta[..., None]))
    since_start = mx.cumsum(decays, axis=-2)  # logarithms of G
    of_start = mx.exp(since_start)
    to_end = mx.exp(since_start[..., -1:, :] - since_start)

    unscaled: Any = inverse(beta * _products(k, k, since_start, strictly=True))
    solve = unscaled * beta.swapaxes(-1, -2)
    own_values = solve @ v
    own_keys = solve @ (of_start * k)
    attended = _products(q, k, since_start, strictly=False)
    q, k = of_start * q, to_end * k
    answers = []
    for number in range(len(v)):
        before = state.swapaxes(-1, -2)
        deltas = own_values[number] - own_keys[number] @ before
        answers.append(q[number] @ before + attended[number] @ deltas)
        state = state * of_start[number, :, :, -1:] + deltas.swapaxes(-1, -2) @ k[number]
    y = mx.stack(answers).transpose(1, 0, 3, 2, 4)  # [B, N, C, H, V]
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :tokens].astype(dtype), state


def _in_pieces(array: mx.array) -> mx.array:
    """[B, T, H, width] -> [N, B, H, C, width], filled up with zeros."""
    rows, tokens, heads, width = array.shape
    missing = -tokens % CHUNK
    if missing:
        array = mx.pad(array, [(0, 0), (0, missing), (0, 0), (0, 0)])
    return array.reshape(rows, -1, CHUNK, heads, width).transpose(1, 0, 3, 2, 4)


def _products(x: mx.array, k: mx.array, since_start: mx.array, strictly: bool) -> mx.array:
    """(x_t . k_j) G_t / G_j for j <= t, or strictly j < t, else 0: [..., C, C]. x, k [..., C, D], since_start
    [..., C, 1 or D].
    """
    if since_start.shape[-1] == 1:
        seen = mx.tril(mx.ones((CHUNK, CHUNK), mx.bool_), -1 if strictly else 0)
        between = since_start - since_start.swapaxes(-1, -2)
        return (x @ k.swapaxes(-1, -2)) * mx.exp(mx.where(seen, between, -mx.inf))
    # Each channel fades at its own pace: no single number stands between two tokens. With the tokens before a few, G_t
    # / G_j is cut in two where the few begin, so that neither part is larger than 1, and each goes to its own side of a
    # matrix product; among the few themselves it is written out.
    blocks = []
    for start in range(0, CHUNK, FEW):
        few, before = slice(start, start + FEW), slice(0, start)
        at_start = since_start[..., max(start - 1, 0) : max(start, 1), :]
        faded_x = x[..., few, :] * mx.exp(since_start[..., few, :] - at_start)
        faded_k = k[..., before, :] * mx.exp(at_start - since_start[..., before, :])
        own = _products_by_channel(x[..., few, :], k[..., few, :], since_start[..., few, :], strictly)
        unseen = mx.zeros((*own.shape[:-1], CHUNK - start - FEW), own.dtype)
        blocks.append(mx.concatenate([faded_x @ faded_k.swapaxes(-1, -2), own, unseen], axis=-1))
    return mx.concatenate(blocks, axis=-2)


def _products_by_channel(x: mx.array, k: mx.array, since_start: mx.array, strictly: bool) -> mx.array:
    """As `_products`, written out: x, k and since_start [..., few, D] -> [..., few, few]."""
    tokens = x.shape[-2]
    seen = mx.tril(mx.ones((tokens, tokens), mx.bool_), -1 if strictly else 0)
    between = since_start[..., :, None, :] - since_start[..., None, :, :]  # [..., few, few, D]
    ratios = mx.exp(mx.where(seen[..., None], between, -mx.inf))
    return (x[..., :, None, :] * k[..., None, :, :] * ratios).sum(axis=-1)


def inverse_by_blocks(below: mx.array) -> mx.array:
    """(I + L)^-1 of strictly lower triangular L [..., C, C].

    Blocks of one number on the diagonal are their own inverse. Two neighbours make a block of twice the size, until one
    is left:  inverse of (A 0; L D) = (A^-1 0; -D^-1 L A^-1 D^-1). (The series I - L + L^2 - ... would be simpler, but
    where keys repeat its terms reach thousands, and cancel.)
    """
    size = below.shape[-1]
    place = mx.arange(size)
    found = mx.broadcast_to(mx.eye(size, dtype=below.dtype), below.shape)
    block = 1
    while block < size:
        number = place // block  # of each row's or column's block
        lower_left = (number[:, None] == number[None] + 1) & (number[:, None] % 2 == 1)
        found = found - found @ (below * lower_left) @ found
        block *= 2
    return found


inverse = mx.custom_function(inverse_by_blocks)


@inverse.vjp
def _inverse_vjp(_: mx.array, cotangent: mx.array, found: mx.array) -> mx.array:
    transposed = found.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)
