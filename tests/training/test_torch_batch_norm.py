"""Statistics of a sample on torch: equal, with their gradients, to the definition in float64.

The definition is differentiated by torch. Nothing here loads Keras.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from mbn_rewrite.training.sampling import Sampling
from mbn_rewrite.training.torch.sampled_batch_norm import (
    implementation,
    normalize,
    normalize_by_sample,
)

pytestmark = pytest.mark.slow

# Relative to the largest value: a few roundings of the dtype in sums of hundreds.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 5e-6, "float64": 1e-13}
NAMES = ("y", "dx", "dgamma", "dbeta", "mean", "variance", "count")
EPSILON = 1e-3


@dataclass(frozen=True)
class Case:
    shape: tuple
    axis: int
    strides: tuple
    dtype: str = "float32"
    masked: bool = False
    depthwise: bool = False
    layout: str = "as given"

    @property
    def sampling(self):
        return Sampling(self.axis, self.strides, EPSILON, False, self.depthwise)

    def tensors(self, seed=0):
        """x, dy, gamma, beta and the mask, or None."""
        rng = np.random.default_rng(seed)
        channels = self.shape[self.axis]
        dtype = getattr(torch, self.dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mask = rng.random([size for i, size in enumerate(self.shape) if i != self.axis]) < 0.7
        mask.flat[0] = True
        x, dy = (torch.tensor(rng.standard_normal(self.shape)).to(dtype) for _ in range(2))
        gamma, beta = (torch.tensor(rng.standard_normal(channels)).to(wide) for _ in range(2))
        x = LAYOUTS[self.layout](x * 2 + 1)
        return x, dy, gamma, beta, torch.tensor(mask) if self.masked else None


def transposed(x):
    """The same numbers, with the last axis first in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def sliced(x):
    """The same numbers, in a larger tensor with others between them."""
    larger = torch.full([2 * size for size in x.shape], 1e4, dtype=x.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


LAYOUTS = {"as given": lambda x: x, "transposed": transposed, "sliced": sliced}


def ours(case, x, dy, gamma, beta, mask):
    """y, gradients and statistics."""
    leaves = [t.detach().requires_grad_() for t in (x, gamma, beta)]
    y, moments = normalize_by_sample(*leaves, case.sampling, mask)
    gradients = torch.autograd.grad(y, leaves, dy)
    return y.detach(), *gradients, moments.mean, moments.variance, moments.count


def defined(case, x, gamma, beta, mask):
    """y, the mean, the variance and the count, by the definition."""
    along = [-1 if i == case.axis else 1 for i in range(len(case.shape))]
    axes = [i for i in range(len(case.shape)) if i != case.axis]
    last = case.axis == len(case.shape) - 1
    steps = [1, *case.strides, 1] if last else [1, 1, *case.strides]
    places = tuple(slice(None, None, step) for step in steps)
    counted = torch.ones(case.shape, dtype=torch.float64)
    if mask is not None:
        counted = counted * mask.unsqueeze(case.axis)
    counted = counted[places]
    count = counted.sum(axes, keepdim=True)
    mean = (counted * x[places]).sum(axes, keepdim=True) / count
    variance = (counted * (x[places] - mean) ** 2).sum(axes, keepdim=True) / count
    xhat = (x - mean) / torch.sqrt(variance + EPSILON)
    y = xhat * gamma.reshape(along) + beta.reshape(along)
    return y, mean.reshape(-1), variance.reshape(-1), count.reshape(-1)[0]


def reference(case, x, dy, gamma, beta, mask):
    leaves = [t.detach().double().requires_grad_() for t in (x, gamma, beta)]
    y, *statistics = defined(case, *leaves, mask)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    return y.detach(), *gradients, *(t.detach() for t in statistics)


def check(case, run=ours, seed=0):
    tensors = case.tensors(seed)
    expected = reference(case, *tensors)
    got = run(case, *tensors)
    assert got[0].dtype == got[1].dtype == tensors[0].dtype
    x, dy, gamma = (t.double().abs() for t in tensors[:3])
    slope = gamma.max() / torch.sqrt(expected[5].min() + EPSILON)
    spread = np.sqrt(dy.numel()) * dy.max()  # of a sum over positions
    # What is summed, where the sum may cancel.
    terms = {"dx": slope * dy.max(), "dgamma": spread, "dbeta": spread}
    terms |= {"mean": x.max(), "variance": x.max() ** 2}
    for name, a, b in zip(NAMES, got, expected, strict=True):
        largest = max(b.abs().max(), terms.get(name, 0))
        error = (a.double() - b).abs().max() / largest
        wide = "float64" if case.dtype == "float64" else "float32"
        dtype = case.dtype if name in ("y", "dx") else wide
        assert error <= TOLERANCE[dtype], f"{name} is {error:.1e} apart"


CASES = {
    "rank_2": Case((6, 8), 1, ()),
    "rank_3": Case((4, 15, 8), 2, (4,)),
    "rank_3_channels_first": Case((4, 8, 15), 1, (4,)),
    "rank_4": Case((4, 12, 8, 8), 3, (4, 4)),
    "does_not_divide": Case((4, 11, 7, 8), 3, (4, 2)),
    "rows": Case((4, 12, 8, 8), 3, (4, 1)),
    "columns": Case((4, 12, 8, 8), 3, (1, 4)),
    "everything": Case((4, 12, 8, 8), 3, (1, 1)),
    "everything_channels_first": Case((4, 8, 12, 8), 1, (1, 1)),
    "channels_first": Case((3, 8, 9, 7), 1, (2, 3)),
    "rank_5": Case((2, 5, 6, 7, 8), 4, (2, 2, 2)),
    "rank_5_everything": Case((2, 5, 6, 7, 8), 4, (1, 1, 1)),
    "rank_5_channels_first": Case((2, 8, 5, 6, 7), 1, (1, 2, 3)),
    "one_channel": Case((4, 8, 8, 1), 3, (2, 2)),
    "mask": Case((4, 12, 8, 8), 3, (4, 2), masked=True),
    "mask_everything": Case((4, 12, 8), 2, (1,), masked=True),
    "depthwise": Case((4, 12, 8, 8), 3, (2, 2), depthwise=True),
    "depthwise_everything": Case((4, 12, 8, 8), 3, (1, 1), depthwise=True),
    "transposed": Case((4, 12, 8, 8), 3, (2, 2), layout="transposed"),
    "transposed_everything": Case((4, 12, 8, 8), 3, (1, 1), layout="transposed"),
    "sliced": Case((4, 12, 8, 8), 3, (2, 2), layout="sliced"),
    "sliced_everything": Case((4, 12, 8, 8), 3, (1, 1), layout="sliced"),
}
DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_automatic_differentiation(case, dtype):
    check(replace(case, dtype=dtype))


@st.composite
def cases(draw):
    rank = draw(st.integers(2, 5))
    last = draw(st.booleans())
    spatial = draw(st.lists(st.integers(1, 9), min_size=rank - 2, max_size=rank - 2))
    batch, channels = draw(st.integers(2, 4)), draw(st.integers(1, 9))
    return Case(
        (batch, *spatial, channels) if last else (batch, channels, *spatial),
        rank - 1 if last else 1,
        tuple(draw(st.integers(1, 5)) for _ in spatial),
        draw(st.sampled_from(["float32", "float64"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(list(LAYOUTS))),
    )


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 1000))
def test_random_cases(case, seed):
    check(case, seed=seed)


@pytest.mark.parametrize("name", ["rank_4", "everything", "everything_channels_first"])
@pytest.mark.parametrize("layout", [transposed, sliced, lambda dy: dy.mean().expand(dy.shape)])
def test_layouts_of_the_gradient(name, layout):
    """A gradient in another layout than x, as of a pooling, gives the same."""
    x, dy, *rest = CASES[name].tensors()
    dy = layout(dy)
    for a, b in zip(
        ours(CASES[name], x, dy, *rest), ours(CASES[name], x, dy.contiguous(), *rest), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_wrong_gradient_is_seen():
    """Without the share of the statistics, the gradient does not pass."""

    def fixed_statistics(case, x, dy, gamma, beta, mask):
        y, _, *rest = ours(case, x, dy, gamma, beta, mask)
        return y, dy * gamma * torch.rsqrt(rest[3] + EPSILON), *rest

    with pytest.raises(AssertionError, match="dx is"):
        check(CASES["rank_4"], fixed_statistics)


# ---------------------------------------------------------------------- edges of the domain


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_one_position(strides, depthwise):
    """The variance of one position is 0, and its output beta."""
    case = Case((1, 1, 1, 3), 3, strides, depthwise=depthwise)
    y, dx, *_, variance, count = ours(case, *case.tensors())
    np.testing.assert_allclose(y[0, 0, 0], case.tensors()[3], atol=1e-5)
    np.testing.assert_allclose(dx, 0, atol=1e-5)
    np.testing.assert_array_equal(variance, 0)
    assert count == 1


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_no_examples(strides, depthwise):
    case = Case((0, 4, 4, 3), 3, strides, depthwise=depthwise)
    rng = torch.ones(3)
    x = torch.zeros(case.shape)
    results = ours(case, x, x, rng, rng, None)
    assert results[0].shape == results[1].shape == case.shape
    assert all(torch.isfinite(t).all() for t in results)
    assert results[-1] == 0


@pytest.mark.parametrize("depthwise", [False, True])
def test_constant_input(depthwise):
    """A variance of 0 gives finite numbers."""
    case = Case((4, 8, 8, 3), 3, (2, 2), depthwise=depthwise)
    _, dy, gamma, beta, _ = case.tensors()
    results = ours(case, torch.full(case.shape, 7.0), dy, gamma, beta, None)
    assert all(torch.isfinite(t).all() for t in results)
    np.testing.assert_allclose(results[0], beta.expand(case.shape), atol=1e-3)


def test_everything_masked():
    """No positions give finite numbers too, and a count that says so."""
    case = CASES["mask"]
    x, dy, gamma, beta, mask = case.tensors()
    results = ours(case, x, dy, gamma, beta, torch.zeros_like(mask))
    assert all(torch.isfinite(t).all() for t in results)
    assert results[-1] == 0


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean(mean, strides, axis):
    """A mean of thousands of standard deviations costs the digits that x itself has lost."""
    case = Case((4, 16, 16, 16), axis, strides)
    x, dy, gamma, beta, _ = case.tensors()
    x = (x - 1) / 2 + mean
    y, *_, variance, _ = ours(case, x, dy, gamma, beta, None)
    expected_y, *_, expected, _ = reference(case, x, dy, gamma, beta, None)
    np.testing.assert_allclose(variance, expected, rtol=1e-4)
    largest = gamma.abs().max().item()
    np.testing.assert_allclose(y, expected_y, atol=4 * np.finfo("float32").eps * mean * largest)


@pytest.mark.parametrize("name", ["rank_2", "rank_4", "channels_first", "rank_5", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_statistics(name, dtype):
    case = replace(CASES[name], dtype=dtype)
    x, _, gamma, beta, _ = case.tensors()
    mean, variance = torch.full_like(gamma, 0.5), torch.full_like(gamma, 2)
    along = [-1 if i == case.axis else 1 for i in range(len(case.shape))]
    y = normalize(x, gamma, beta, mean, variance, case.sampling)
    slope = gamma.double() / np.sqrt(2 + EPSILON)
    expected = (x.double() - 0.5) * slope.reshape(along) + beta.double().reshape(along)
    assert y.dtype == x.dtype
    bound = TOLERANCE[dtype]
    np.testing.assert_allclose(y.double(), expected, rtol=bound, atol=bound * 10)


# ------------------------------------------------------------------- what torch does with it


@pytest.mark.parametrize("name", ["rank_4", "everything", "depthwise", "mask"])
def test_second_derivative(name):
    """Of gradients as penalties: by torch's numerical check in float64."""
    case = replace(CASES[name], shape=(2, 3, 2, 2), dtype="float64")
    x, _, gamma, beta, mask = case.tensors()
    leaves = [t.requires_grad_() for t in (x, gamma, beta)]

    def output(*leaves):
        return normalize_by_sample(*leaves, case.sampling, mask)[0]

    assert torch.autograd.gradcheck(output, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("name", ["rank_4", "everything"])
def test_part_of_the_gradients(name, wanted):
    """Where inputs or weights are fixed, the other gradients are the same."""
    case = CASES[name]
    x, dy, gamma, beta, mask = case.tensors()
    _, *expected = ours(case, x, dy, gamma, beta, mask)
    leaves = [x.clone(), gamma.clone(), beta.clone()]
    for i in wanted:
        leaves[i].requires_grad_()
    y, _ = normalize_by_sample(*leaves, case.sampling, mask)
    got = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    for i, gradient in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(gradient, expected[i])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["rank_4", "everything", "depthwise", "mask"])
def test_compiled(name):
    """In one graph, without breaks."""
    case = CASES[name]
    mask = case.tensors()[4]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, gamma, beta):
        y, moments = normalize_by_sample(x, gamma, beta, case.sampling, mask)
        return y, moments.mean, moments.variance, moments.count

    def run(case, x, dy, gamma, beta, mask):
        leaves = [t.detach().requires_grad_() for t in (x, gamma, beta)]
        y, *statistics = compiled(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy), *statistics

    check(case, run)


@pytest.mark.parametrize("name", ["rank_4", "everything", "depthwise", "mask"])
def test_only_the_input_is_kept_for_the_gradient(name):
    """Of all tensors of the forward pass, the gradient keeps x, vectors and the mask."""
    x, _, gamma, beta, mask = CASES[name].tensors()
    leaves = [t.requires_grad_() for t in (x, gamma, beta)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normalize_by_sample(*leaves, CASES[name].sampling, mask)
    storages = {t.untyped_storage().data_ptr() for t in kept if t.numel() > gamma.numel()}
    inputs = {t.untyped_storage().data_ptr() for t in (x, mask) if t is not None}
    assert storages == inputs


@pytest.mark.parametrize("name", ["everything", "everything_channels_first", "rank_5_everything"])
def test_no_copy_of_either_layout(name):
    """The kernel reads and writes tensors where they are, channels first and last."""
    case = CASES[name]
    x, _, gamma, beta, _ = case.tensors()
    with torch.profiler.profile(record_shapes=True) as profile:
        y, _ = normalize_by_sample(x, gamma, beta, case.sampling)
    assert y.is_contiguous()
    of_whole = {
        event.name.removeprefix("aten::")
        for event in profile.events()
        if any(shape and np.prod(shape) == x.numel() for shape in event.input_shapes)
    }
    assert "native_batch_norm" in of_whole
    assert not of_whole & {"clone", "copy_", "_to_copy"}


OPERATIONS = {
    "everything": {"native_batch_norm", "native_batch_norm_backward"},
    "rank_4": {"native_batch_norm", "native_batch_norm_backward", "sub_"},
    "depthwise": {"conv2d", "native_batch_norm_backward", "sub_"},
    "depthwise_everything": {"conv2d", "native_batch_norm_backward"},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_runs_is_named(name):
    case = CASES[name]
    x, dy, gamma, beta, mask = case.tensors()
    with torch.profiler.profile() as profile:
        ours(case, x, dy, gamma, beta, mask)
    ran = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    assert OPERATIONS[name] <= ran
    assert ("sub_" in ran) == ("sub_" in OPERATIONS[name])
    told = implementation(x, case.sampling, mask, training=True)
    assert ("conv2d" in told) == ("conv2d" in ran)
    assert ("in place" in told) == ("sub_" in ran)
