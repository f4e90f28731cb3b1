"""The room of torch: its own batch normalisation kernels, and the gradient of a sample.

The equations are in `training.backends`. Where the sample is everything, torch's operation for
training does all of it, and its gradient too. Elsewhere the same kernels are called with given
statistics, once for the output and once for the gradient everywhere; only the correction due in
the sample is added here, in place.

Channels are moved to axis 1 and all positions to one axis, which copies nothing as long as the
positions lie in order in memory: torch's kernels then read either layout as it is. Where layouts
are mixed (a gradient that is channels first, or the same number everywhere) torch falls back to
code that is several times as slow and sums in the dtype of x, so that never happens here.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.training.sampling import Moments, Sampling


def normalize_by_sample(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    sampling: Sampling,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Moments]:
    """Batch normalisation in training; see `training.backends.Backend`."""
    y, *statistics = _BySample.apply(x, gamma, beta, mask, sampling)
    # Not in the function: torch forbids changes in place of a view that a function returns.
    return _shaped_like(y, x, sampling), Moments(*statistics)


def normalize(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    """Batch normalisation by given statistics; see `training.backends.Backend`."""
    images = _as_images(x, sampling)
    y = _by_statistics(images, gamma, beta, mean, variance, sampling.epsilon)
    return _shaped_like(y, x, sampling)


def implementation(
    x: torch.Tensor, sampling: Sampling, mask: torch.Tensor | None = None, *, training: bool
) -> str:
    """What runs, in words; see `training.backends.Backend`."""
    if not training:
        return "batch_norm, by given statistics"
    whole = _is_whole(sampling, mask)
    if whole and not sampling.depthwise:
        return "batch_norm, native_batch_norm_backward"
    where = "everything" if sampling.everything else "the sample"
    statistics = f"batch_norm of {where}" if mask is None else f"masked statistics of {where}"
    output = "conv2d by channel" if sampling.depthwise else "batch_norm by them"
    in_sample = "" if whole else ", sub_ in place in the sample"
    return f"{statistics}, {output}, native_batch_norm_backward{in_sample}"


def check_input(x: Any, moving_mean: Any, label: str) -> None:
    """Checks that an input is dense and lies where the layer does."""
    if isinstance(x, torch.Tensor) and x.layout != torch.strided:
        raise RewriteError(
            f"{label} was given a tensor of layout {x.layout}. Dense tensors are needed: call its "
            "to_dense() before this layer"
        )
    weights = moving_mean.value.device
    if isinstance(x, torch.Tensor) and x.device != weights:
        raise RewriteError(
            f"{label} has its weights on {weights}, and was given a tensor on {x.device}. Move one "
            "to the other: x.to(device), or model.to(device)"
        )


def check_synchronized(label: str) -> None:
    """Refuses: statistics of several processes are not taken together."""
    raise RewriteError(
        f"{label} has synchronized=True, which it cannot do in training on torch: statistics are "
        "those of one process. Set synchronized=False, or use Keras 3 on TensorFlow or JAX"
    )


# -------------------------------------------------------------------------------- kernels


def _is_whole(sampling: Sampling, mask: torch.Tensor | None) -> bool:
    """Whether statistics are of every position."""
    return sampling.everything and mask is None


def _in_training(
    images: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, Moments]:
    """y and the moments, by torch's operation for training.

    Moving statistics that it moves the whole way (momentum 1) are those of the batch.
    """
    mean, unbiased = (torch.zeros_like(gamma) for _ in range(2))
    y = torch.batch_norm(
        images, gamma, beta, mean, unbiased, True, 1.0, epsilon, torch.backends.cudnn.enabled
    )
    count = images.numel() // images.shape[1]
    # Of one position it is 0 / 0.
    variance = unbiased * ((count - 1) / count) if count > 1 else torch.zeros_like(unbiased)
    return y, Moments(mean, variance, mean.new_tensor(count))


def _by_statistics(
    images: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    return torch.batch_norm(
        images, gamma, beta, mean, variance, False, 0.0, epsilon, torch.backends.cudnn.enabled
    )


def _depthwise(
    images: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, moments: Moments, epsilon: float
) -> torch.Tensor:
    """y by a depthwise 1x1 convolution with a bias, in the dtype of the images."""
    scale = gamma * torch.rsqrt(moments.variance + epsilon)
    shift = beta - moments.mean * scale
    kernel = scale.to(images.dtype).reshape(-1, 1, 1, 1)
    with torch.autocast(images.device.type, enabled=False):  # would have it in a narrow dtype
        return torch.conv2d(images, kernel, shift.to(images.dtype), groups=kernel.shape[0])


# ------------------------------------------------------------- statistics of a sample


class _BySample(torch.autograd.Function):
    """y as images, mean, variance and count; of what is large only x is kept for the gradient."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        mask: torch.Tensor | None,
        sampling: Sampling,
    ) -> tuple[torch.Tensor, ...]:
        images, epsilon = _as_images(x, sampling), sampling.epsilon
        if _is_whole(sampling, mask):
            y, moments = _in_training(images, gamma, beta, epsilon)
        else:
            moments = _sample_moments(x, gamma, mask, sampling)
            given = moments.mean, moments.variance
            y = _by_statistics(images, gamma, beta, *given, epsilon)
        if sampling.depthwise and images.numel():  # a convolution of no positions is an error
            y = _depthwise(images, gamma, beta, moments, epsilon)
        return y, moments.mean, moments.variance, moments.count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, gamma, beta, mask, sampling = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(x, gamma, beta, mask, *statistics)
        ctx.sampling = sampling

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, gamma, beta, mask, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # which is to be differentiated itself
            return *_differentiable_gradient(x, dy, gamma, beta, mask, ctx), None, None
        moments = Moments(*statistics)
        return *_gradient(x, dy, gamma, moments, mask, ctx.sampling), None, None


def _gradient(
    x: torch.Tensor,
    dy: torch.Tensor,
    gamma: torch.Tensor,
    moments: Moments,
    mask: torch.Tensor | None,
    sampling: Sampling,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dgamma and dbeta, from dy as images."""
    if not x.numel():  # for which torch's kernel divides by zero, and ends the process
        return torch.zeros_like(x), torch.zeros_like(gamma), torch.zeros_like(gamma)
    whole = _is_whole(sampling, mask)
    mean, variance, epsilon = moments.mean, moments.variance, sampling.epsilon
    inverse = torch.rsqrt(variance + epsilon)
    images = _as_images(x, sampling)
    slopes = dy.contiguous(memory_format=_layout(images))
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        slopes, images, gamma, mean, variance, mean, inverse, whole, epsilon, [True, True, True]
    )
    dx = _shaped_like(dx, x, sampling)
    if whole:
        return dx, dgamma, dbeta
    weight = gamma * inverse / moments.count.clamp(min=1)
    # Centred first, since statistics of few positions may be far from what is sampled.
    centred = _sampled(x, sampling).to(gamma.dtype) - _along(mean, x, sampling)
    shift, slope = weight * dbeta, weight * inverse * dgamma
    due = torch.addcmul(_along(shift, x, sampling), centred, _along(slope, x, sampling))
    if mask is not None:
        due = due * _counted(mask, x, sampling)
    # Nothing else reads dx, so it may be changed where it lies.
    dx[_places(x, sampling)].sub_(due)
    return dx, dgamma, dbeta


def _differentiable_gradient(
    x: torch.Tensor,
    dy: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mask: torch.Tensor | None,
    ctx: Any,
) -> list[torch.Tensor | None]:
    """The gradient by automatic differentiation of the definition, which can be repeated."""
    sampling = ctx.sampling
    wide = x.to(gamma.dtype)
    moments = _defined_moments(_sampled(wide, sampling), _counted(mask, x, sampling), sampling)
    inverse = torch.rsqrt(moments.variance + sampling.epsilon)
    mean, inverse, gamma_, beta_ = (
        _along(vector, x, sampling) for vector in (moments.mean, inverse, gamma, beta)
    )
    y = ((wide - mean) * inverse * gamma_ + beta_).to(x.dtype)
    dy, needs = _shaped_like(dy, x, sampling), ctx.needs_input_grad[:3]
    wanted = [t for t, needed in zip((x, gamma, beta), needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]


def _sample_moments(
    x: torch.Tensor, gamma: torch.Tensor, mask: torch.Tensor | None, sampling: Sampling
) -> Moments:
    """The moments of the sample; gamma is of the dtype of statistics."""
    sample = _sampled(x, sampling)
    if mask is not None:
        return _defined_moments(sample.to(gamma.dtype), _counted(mask, x, sampling), sampling)
    one, zero = torch.ones_like(gamma), torch.zeros_like(gamma)
    return _in_training(_as_images(sample, sampling), one, zero, sampling.epsilon)[1]


def _defined_moments(
    sample: torch.Tensor, counted: torch.Tensor | None, sampling: Sampling
) -> Moments:
    """The moments of a sample in the dtype of statistics, in two passes over it."""
    axes = [i for i in range(sample.dim()) if i != sampling.axis]
    if counted is None:
        counted = torch.ones_like(sample[:, :1] if sampling.axis == 1 else sample[..., :1])
    counted = counted.to(sample.dtype)
    count = counted.sum()
    of_count = count.clamp(min=1)
    mean = (counted * sample).sum(axes, keepdim=True) / of_count
    variance = (counted * (sample - mean) ** 2).sum(axes) / of_count
    return Moments(mean.reshape(-1), variance, count)


# ------------------------------------------------------------------------ shapes and places


def _as_images(x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """x as [N, C, 1, positions], dense in either layout; a view where positions lie in order."""
    x = x.movedim(sampling.axis, 1)
    images = x.reshape(x.shape[0], x.shape[1], 1, math.prod(x.shape[2:]))
    return images.contiguous(memory_format=_layout(images))


def _layout(images: torch.Tensor) -> torch.memory_format:
    """The layout that images are in, or channels first where they are in neither."""
    last = torch.channels_last
    return last if images.is_contiguous(memory_format=last) else torch.contiguous_format


def _shaped_like(images: torch.Tensor, x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Images in the shape of x."""
    shape = x.movedim(sampling.axis, 1).shape
    return images.reshape(shape).movedim(1, sampling.axis)


def _places(x: torch.Tensor, sampling: Sampling) -> tuple[slice, ...]:
    return tuple(slice(None, None, step) for step in sampling.steps(x.dim()))


def _sampled(x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The sample, together in memory."""
    return x if sampling.everything else x[_places(x, sampling)].clone()


def _along(vector: torch.Tensor, x: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """A vector of the channels in a shape that broadcasts against x."""
    return vector.reshape([-1 if i == sampling.axis else 1 for i in range(x.dim())])


def _counted(mask: torch.Tensor | None, x: torch.Tensor, sampling: Sampling) -> torch.Tensor | None:
    """A mask of the sample, with an axis for the channels."""
    if mask is None:
        return None
    mask = mask.to(torch.bool).unsqueeze(sampling.axis)
    shape = [1 if i == sampling.axis else size for i, size in enumerate(x.shape)]
    return mask.expand(shape)[_places(x, sampling)]
