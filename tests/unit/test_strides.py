"""Strides: what may be given, and what a layer makes of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbn_rewrite import RewriteError
from mbn_rewrite.training import strides

SIZES = st.integers(1, 80)


@pytest.mark.parametrize("stride", [1, 4, (8, 1), [2, 3], np.int64(2), (np.int32(2), 1)])
def test_accepted(stride):
    checked = strides.checked(stride)
    assert type(checked) in (int, tuple)
    assert np.array_equal(checked, stride)


@pytest.mark.parametrize(
    "stride", [0, -1, 1.5, 2.0, True, "4", None, (), (2,), (1, 2, 3), (2, 0), (2, 1.5), {1: 2}]
)
def test_refused(stride):
    with pytest.raises(RewriteError, match="positive whole number"):
        strides.checked(stride)


@pytest.mark.parametrize("least", [0, -3, 1.5, None, True])
def test_refused_min_samples(least):
    with pytest.raises(RewriteError, match="min_samples"):
        strides.checked_min_samples(least)


@pytest.mark.parametrize(
    ("stride", "expected"),
    [(2, 2), ((4, 1), (4, 1)), ({"a": 8}, 8), ({"b": 8}, 1), (lambda name: len(name) + 1, 2)],
    ids=["int", "pair", "mapping", "not_in_mapping", "function"],
)
def test_for_layer(stride, expected):
    assert strides.for_layer(stride, "a") == expected


@pytest.mark.parametrize("stride", [{"a": 0}, lambda name: "much"], ids=["mapping", "function"])
def test_for_layer_names_the_layer(stride):
    with pytest.raises(RewriteError, match="stride of 'a'"):
        strides.for_layer(stride, "a")


@pytest.mark.parametrize(
    ("stride", "spatial_rank", "expected"),
    [
        (3, 0, ()),
        (3, 1, (3,)),
        (3, 2, (3, 3)),
        (3, 3, (3, 3, 3)),
        ((4, 2), 0, ()),
        ((4, 2), 1, (4,)),
        ((4, 2), 2, (4, 2)),
        ((4, 2), 3, (1, 4, 2)),
    ],
)
def test_along_axes(stride, spatial_rank, expected):
    assert strides.along_axes(stride, spatial_rank) == expected


@pytest.mark.parametrize(
    ("given_strides", "sizes", "expected"),
    [
        ((4, 4), (56, 56), (4, 4)),
        ((8, 8), (14, 14), (4, 4)),
        ((4, 4), (7, 7), (1, 1)),
        ((2, 2), (7, 7), (2, 2)),
        ((8, 8), (3, 3), (1, 1)),
        ((14, 1), (7, 7), (1, 1)),
        ((32, 1), (28, 28), (28, 1)),
        ((8,), (100,), (6,)),
        ((8, 8), (None, 7), (8, 7)),
        ((4, 4), (0, 7), (1, 1)),
        ((), (), ()),
    ],
)
def test_lowered(given_strides, sizes, expected):
    assert strides.lowered(given_strides, sizes) == expected


@given(st.lists(st.tuples(st.integers(1, 20), SIZES), max_size=3), st.integers(1, 40))
def test_lowered_leaves_enough_and_no_more_than_that(axes, least):
    given_strides, sizes = tuple(a for a, _ in axes), tuple(b for _, b in axes)
    result = strides.lowered(given_strides, sizes, least)
    left = len(np.zeros(sizes)[tuple(slice(None, None, s) for s in result)].ravel())
    assert strides.positions(result, sizes) == left
    assert left >= min(least, np.prod(sizes))
    assert all(a <= b for a, b in zip(result, given_strides, strict=True))
    if strides.positions(given_strides, sizes) >= least:
        assert strides.positions(given_strides, sizes) == left
