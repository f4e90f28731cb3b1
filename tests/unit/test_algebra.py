"""The algebra of per-channel maps, by properties, in float64 and without a framework."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mbn_rewrite.ir import layouts
from mbn_rewrite.ir.algebra import fold
from mbn_rewrite.ir.channel_map import ChannelMap, reshaped
from mbn_rewrite.ir.graph import Linear
from mbn_rewrite.ir.kernels import Kernel
from mbn_rewrite.passes.precision import weights_out_of_range
from mbn_rewrite.plans import Fold

small = st.integers(-4, 4).map(float)


def vectors(size):
    return hnp.arrays(np.float64, size, elements=small)


@st.composite
def maps(draw, channels=None, axis=1):
    size = channels or draw(st.integers(1, 6))
    return ChannelMap(draw(vectors(size)), draw(vectors(size)), axis)


def applied(m, x):
    """The map on an array, whatever its axis."""
    shape = [1] * x.ndim
    shape[m.axis] = -1
    return x * m.scale.reshape(shape) + m.shift.reshape(shape)


def test_batch_norm_is_the_published_formula():
    gamma, beta, mean, variance = (np.array([v]) for v in (2.0, 3.0, 5.0, 0.25 - 1e-3))
    m = ChannelMap.of_batch_norm(gamma, beta, mean, variance, 1e-3, 3)
    x = np.array([7.0])
    expected = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
    np.testing.assert_allclose(m.scale * x + m.shift, expected, rtol=1e-15)


@given(st.integers(1, 5).flatmap(lambda n: st.tuples(maps(n), maps(n), vectors((3, n)))))
def test_then_is_composition(case):
    first, second, x = case
    np.testing.assert_array_equal(
        applied(first.then(second), x), applied(second, applied(first, x))
    )


# Layouts as matrices: what a kernel does at a single position.

KERNELS = {
    "dense": Kernel("kernel", (4, 6), (0,), (1,)),
    "conv": Kernel("kernel", (2, 3, 4, 6), (2,), (3,)),
    "transpose": Kernel("kernel", (2, 3, 6, 4), (3,), (2,)),
    "depthwise": Kernel("kernel", (2, 3, 4, 2), (2,), (2, 3)),
    "groups": Kernel("kernel", (2, 2, 2, 2, 3), (3, 2), (3, 4)),
}


def as_matrix(kernel, array):
    """The kernel summed over its window: input channels by output channels."""
    view = array.reshape(kernel.view)
    inputs = int(np.prod([kernel.view[i] for i in kernel.in_dims]))
    matrix = []
    for i in range(inputs):
        spread = np.zeros([kernel.view[d] for d in kernel.in_dims]).reshape(-1)
        spread[i] = 1.0
        spread = spread.reshape([kernel.view[d] for d in kernel.in_dims])
        order = np.argsort(kernel.in_dims)
        full = [n if d in kernel.in_dims else 1 for d, n in enumerate(kernel.view)]
        picked = view * np.transpose(spread, order).reshape(full)
        others = tuple(d for d in range(view.ndim) if d not in kernel.out_dims)
        matrix.append(picked.sum(axis=others).reshape(-1))
    return np.array(matrix)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data())
def test_fold_is_exact_on_whole_numbers(name, bias, data):
    kernel = KERNELS[name]
    array = data.draw(hnp.arrays(np.float64, kernel.view, elements=small))
    matrix = as_matrix(kernel, array)
    before = data.draw(maps(matrix.shape[0]))
    after = data.draw(maps(matrix.shape[1]))
    offset = data.draw(vectors(matrix.shape[1])) if bias else None
    x = data.draw(vectors((3, matrix.shape[0])))

    (folded,), new_bias = fold([(kernel, array)], offset, before=before, after=after)

    expected = applied(after, applied(before, x) @ matrix + (offset if bias else 0.0))
    np.testing.assert_array_equal(x @ as_matrix(kernel, folded) + new_bias, expected)


@given(before=maps(4), after=maps(5))
def test_fold_into_a_chain_of_kernels(before, after):
    rng = np.random.default_rng(0)
    depthwise = Kernel("depthwise", (2, 2, 4, 3), (2,), (2, 3))
    pointwise = Kernel("pointwise", (1, 1, 12, 5), (2,), (3,))
    arrays = [rng.integers(-3, 4, k.view).astype(np.float64) for k in (depthwise, pointwise)]
    chain = list(zip((depthwise, pointwise), arrays, strict=True))
    x = rng.integers(-3, 4, (3, 4)).astype(np.float64)

    folded, bias = fold(chain, None, before=before, after=after)

    matrices = [as_matrix(k, a) for k, a in chain]
    new = [as_matrix(k, a) for (k, _), a in zip(chain, folded, strict=True)]
    expected = applied(after, applied(before, x) @ matrices[0] @ matrices[1])
    np.testing.assert_array_equal(x @ new[0] @ new[1] + bias, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_are_rounded_once(dtype):
    rng = np.random.default_rng(1)
    kernel = Kernel("kernel", (3, 50), (0,), (1,))
    array = rng.standard_normal((3, 50)).astype(dtype)
    m = ChannelMap(rng.standard_normal(50), np.zeros(50), 1)
    (folded,), _ = fold([(kernel, array)], None, after=m)
    assert folded.dtype == dtype
    exact = array.astype(np.float64) * m.scale
    np.testing.assert_array_equal(folded, exact.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_row_of_a_table_absorbs_scale_and_shift(dtype):
    rng = np.random.default_rng(1)
    table = layouts.table("embeddings", (5000, 4))  # more rows than are held in float64 at once
    array = rng.standard_normal((5000, 4)).astype(dtype)
    m = ChannelMap(rng.standard_normal(4), rng.standard_normal(4), 1)
    (folded,), bias = fold([(table, array)], None, after=m)
    assert folded.dtype == dtype
    np.testing.assert_array_equal(folded, applied(m, array.astype(np.float64)).astype(dtype))
    assert not bias.any()
    action = Fold(Linear((table,), None, None, 2), None, m)
    assert not action.has_shift  # that would take a bias
    assert weights_out_of_range(action, "float32", lambda name: array) == ""
    large = Fold(action.op, None, ChannelMap(np.ones(4), np.full(4, 1e39), 1))
    assert "more than float32 can hold" in weights_out_of_range(large, "float32", lambda _: array)


# ------------------------------------------------------------------------------- reshaping


@st.composite
def reshapes(draw):
    """Two shapes of the same size, and an axis of the first."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3))
    total = int(np.prod(sizes))
    factors = draw(st.permutations([d for d in (2, 2, 3, 4) if total % d == 0]))
    new, rest = [], total
    for factor in factors[:2]:
        if rest % factor == 0:
            new.append(factor)
            rest //= factor
    new = draw(st.permutations([*new, rest]))
    return tuple(sizes), tuple(new), draw(st.integers(1, len(sizes)))


@given(reshapes(), st.data())
def test_reshaped_map_does_the_same(case, data):
    sizes, new_sizes, axis = case
    m = data.draw(maps(sizes[axis - 1], axis))
    result = reshaped(m, (None, *sizes), (None, *new_sizes))
    x = np.arange(2.0 * np.prod(sizes)).reshape(2, *sizes)
    expected = applied(m, x).reshape(2, *new_sizes)
    if result is not None:
        np.testing.assert_array_equal(applied(result, x.reshape(2, *new_sizes)), expected)
    elif x.size > 2:
        # Declined, so no axis may have worked.
        ones = applied(ChannelMap(m.scale, m.shift, axis), np.ones_like(x)).reshape(2, *new_sizes)
        varying = [i for i in range(1, ones.ndim) if np.any(ones != ones.take([0], axis=i))]
        pairs_vary = len({*zip(m.scale, m.shift, strict=True)}) > 1
        assert len(varying) > 1 or pairs_vary


@pytest.mark.parametrize(
    ("shape", "new_shape", "axis", "new_axis"),
    [
        ((None, 5, 5, 3), (None, 25, 3), 3, 2),
        ((None, None, None, 3), (None, None, 3), 3, 2),
        ((None, 3, None, None), (None, 3, None), 1, 1),
        ((None, 4, 4, 3), (None, 48), 3, 1),
        ((None, 4, 6), (None, 4, 2, 3), 1, 1),
    ],
)
def test_reshape_that_keeps_channels_apart(shape, new_shape, axis, new_axis):
    size = shape[axis]
    m = ChannelMap(np.arange(1.0, size + 1), np.zeros(size), axis)
    result = reshaped(m, shape, new_shape)
    assert result is not None
    assert result.axis == new_axis


@pytest.mark.parametrize(
    ("shape", "new_shape", "axis"),
    [
        ((None, 6), (None, 2, 3), 1),
        ((None, 4, 6), (None, 6, 4), 2),
        ((None, None, 6), (None, None, 4), 2),
    ],
)
def test_reshape_that_mixes_channels(shape, new_shape, axis):
    size = shape[axis]
    m = ChannelMap(np.arange(1.0, size + 1), np.zeros(size), axis)
    assert reshaped(m, shape, new_shape) is None
