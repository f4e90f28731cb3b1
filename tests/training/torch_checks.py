"""The training layers on torch: what is torch's own, beside `backend_checks.py`."""

from dataclasses import replace

import keras
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mbn_rewrite as mbn
from mbn_rewrite.training.torch.sampled_batch_norm import (
    implementation,
    normalize,
    normalize_by_sample,
)
from tests.training.sampled_cases import CASES, Case, cases

KINDS = [mbn.StridedBatchNormalization, mbn.ModifiedBatchNormalization]
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def tensors(case, seed=0):
    """x, dy, gamma, beta and the mask, or None."""
    x, dy, *rest = case.arrays(seed)
    dtype = getattr(torch, case.dtype)
    rest = [None if array is None else torch.tensor(array) for array in rest]
    return torch.tensor(x).to(dtype), torch.tensor(dy).to(dtype), *rest


def results(case, x, dy, gamma, beta, mask, run=normalize_by_sample):
    """What `sampled_cases.NAMES` say."""
    leaves = [t.detach().requires_grad_() for t in (x, gamma, beta)]
    y, moments = run(*leaves, case.sampling, mask)
    gradients = torch.autograd.grad(y, leaves, dy)
    return y.detach(), *gradients, moments.mean, moments.variance, moments.count


def check(case, given_tensors, got):
    arrays = [None if t is None else np.asarray(t.double()) for t in given_tensors]
    arrays[4] = None if arrays[4] is None else arrays[4].astype(bool)
    case.check(arrays, [t.double().numpy() for t in got], case.expected(*arrays))


def transposed(x):
    """The same numbers, with the last axis first in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def sliced(x):
    """The same numbers, in a larger tensor with others between them."""
    larger = torch.full([2 * size for size in x.shape], 1e4, dtype=x.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def expanded(x):
    """One number everywhere, as in the gradient of a sum."""
    return x.flatten()[0].expand(x.shape)


# ------------------------------------------------------------------------- layouts in memory

LAYOUTS = [transposed, sliced]
NAMES = ["rank_3", "rank_4", "everything", "channels_first", "rank_5", "mask", "depthwise"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_the_input(name, layout, dtype):
    case = replace(CASES[name], dtype=dtype)
    x, *rest = tensors(case)
    check(case, [x, *rest], results(case, layout(x), *rest))


@pytest.mark.parametrize("layout", [*LAYOUTS, expanded])
@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_the_gradient(name, layout):
    """A gradient in another layout than x, as of a pooling, gives the same."""
    case = CASES[name]
    x, dy, *rest = tensors(case)
    dy = layout(dy)
    expected = results(case, x, dy.contiguous(), *rest)
    for a, b in zip(results(case, x, dy, *rest), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 1000), st.sampled_from([lambda x: x, *LAYOUTS]))
def test_random_cases_and_layouts(case, seed, layout):
    case = replace(case, synchronized=False)
    x, *rest = tensors(case, seed)
    check(case, [x, *rest], results(case, layout(x), *rest))


@pytest.mark.parametrize("name", ["everything", "everything_channels_first", "rank_5_everything"])
def test_no_copy_of_either_layout(name):
    """The kernel reads and writes tensors where they are, channels first and last."""
    x, _, gamma, beta, _ = tensors(CASES[name])
    with torch.profiler.profile(record_shapes=True) as profile:
        y, _ = normalize_by_sample(x, gamma, beta, CASES[name].sampling)
    assert y.is_contiguous()
    of_whole = {
        event.name.removeprefix("aten::")
        for event in profile.events()
        if any(shape and np.prod(shape) == x.numel() for shape in event.input_shapes)
    }
    assert "native_batch_norm" in of_whole
    assert not of_whole & {"clone", "copy_", "_to_copy"}


# ---------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("name", ["rank_4", "everything", "depthwise", "mask"])
def test_only_the_input_is_kept_for_the_gradient(name):
    """Of all tensors of the forward pass, the gradient keeps x, vectors and the mask."""
    x, _, gamma, beta, mask = tensors(CASES[name])
    leaves = [t.requires_grad_() for t in (x, gamma, beta)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normalize_by_sample(*leaves, CASES[name].sampling, mask)
    storages = {t.untyped_storage().data_ptr() for t in kept if t.numel() > gamma.numel()}
    assert storages == {t.untyped_storage().data_ptr() for t in (x, mask) if t is not None}


def test_nothing_is_kept_without_gradients():
    layer = mbn.StridedBatchNormalization(2)
    layer.build((4, 8, 8, 3))
    with torch.no_grad():
        for training in (True, False):
            assert layer(torch.ones(4, 8, 8, 3), training=training).grad_fn is None


# ------------------------------------------------------------------------- what torch can do


@pytest.mark.parametrize("name", ["rank_4", "everything", "depthwise", "mask"])
def test_second_derivative(name):
    """Of gradients as penalties: by torch's numerical check in float64."""
    case = replace(CASES[name], shape=(2, 3, 2, 2), dtype="float64")
    x, _, gamma, beta, mask = tensors(case)
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
    x, dy, gamma, beta, mask = tensors(case)
    _, *expected = results(case, x, dy, gamma, beta, mask)
    leaves = [x.clone(), gamma.clone(), beta.clone()]
    for i in wanted:
        leaves[i].requires_grad_()
    y, _ = normalize_by_sample(*leaves, case.sampling, mask)
    got = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    for i, gradient in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(gradient, expected[i])


# Dynamo makes an instance of the class of the gradient, of which it warns itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["rank_4", "everything", "depthwise", "mask"])
def test_compiled_in_one_graph(name):
    case = CASES[name]
    given_tensors = tensors(case)
    run = torch.compile(normalize_by_sample, fullgraph=True, backend="aot_eager")
    check(case, given_tensors, results(case, *given_tensors, run=run))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_in_place(kind, training):
    """What reads the output may change it where it lies, as after torch's own layer."""
    layer = kind(1)
    x = torch.randn(4, 6, 6, 3, requires_grad=True)
    torch.relu_(layer(x, training=training)).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_outputs_keep_their_dtype(kind):
    layer = kind(1)
    x = torch.randn(4, 6, 6, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, training=True)
    assert y.dtype == torch.float32
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


# ---------------------------------------------------------------------------------- what ran

OPERATIONS = {
    "everything": {"batch_norm", "native_batch_norm_backward"},
    "rank_4": {"batch_norm", "native_batch_norm_backward", "sub_"},
    "mask": {"batch_norm", "native_batch_norm_backward", "sub_"},
    "depthwise": {"conv2d", "native_batch_norm_backward", "sub_"},
    "depthwise_everything": {"batch_norm", "conv2d", "native_batch_norm_backward"},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_runs_is_named(name):
    case = CASES[name]
    x, *rest = tensors(case)
    with torch.profiler.profile() as profile:
        results(case, x, *rest)
    ran = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    told = implementation(x, case.sampling, rest[3], training=True)
    assert OPERATIONS[name] <= ran
    assert all(operation in told for operation in OPERATIONS[name])
    for operation in ("conv2d", "sub_"):
        assert (operation in told) == (operation in ran)


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", KINDS)
def test_another_device(kind):
    layer = kind(1, name="norm")
    layer.build((4, 6, 6, 3))
    with pytest.raises(mbn.RewriteError, match=r"'norm' has its weights on cpu, .* on meta. Move"):
        layer.call(torch.ones(4, 6, 6, 3, device="meta"))


@pytest.mark.parametrize("kind", KINDS)
def test_dense_tensors_are_needed(kind):
    layer = kind(1)
    layer.build((4, 6))
    with pytest.raises(mbn.RewriteError, match=r"layout torch.sparse_coo.*to_dense"):
        layer.call(torch.ones(4, 6).to_sparse())


@pytest.mark.parametrize("kind", KINDS)
def test_synchronized_is_refused_in_training(kind):
    layer = kind(1, synchronized=True, name="norm")
    x = np.ones((4, 6), "float32")
    assert layer(x, training=False).shape == (4, 6)
    with pytest.raises(mbn.RewriteError, match=r"'norm' has synchronized=True.*Set synchronized="):
        layer(x, training=True)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (4, 0, 4, 3)])
def test_nothing_in_the_input(shape, depthwise):
    """torch's kernels and convolutions cannot do that."""
    case = Case(shape, 3, (1, 1), depthwise=depthwise)
    x, one = torch.zeros(shape), torch.ones(3)
    got = results(case, x, x, one, one, None)
    assert got[0].shape == got[1].shape == shape
    assert all(torch.isfinite(t).all() for t in got)
    assert normalize(x, one, one, one, one, case.sampling).shape == shape
    assert keras.ops.convert_to_numpy(got[-1]) == 0


def test_models_are_compared_without_tensor_float_32():
    seen = []

    class Asking(keras.layers.Layer):
        def call(self, x):
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return x + 0

    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), Asking()])
    seen.clear()
    mbn.verify(model, model)
    assert seen == [(False, "highest")] * 2
    assert before == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    assert before[0]  # or nothing is shown
