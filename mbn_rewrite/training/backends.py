"""What a backend of Keras has to offer to the training layers, and where each one's is.

The mathematics is in a room for each backend, of which one is loaded; the layers know none of it.
With S the sampled positions, |S| their number (over the whole batch), mu and var the mean and
the population variance of x over S, and r = 1 / sqrt(var + epsilon), the output is, everywhere,

    xhat = (x - mu) r          y = gamma xhat + beta

and the gradient, with sums over all positions,

    dbeta = sum dy             dgamma = sum dy xhat
    dx = gamma r dy            everywhere, and in S also
    dx -= gamma r / |S| (dbeta + xhat dgamma)

which is that of Ioffe and Szegedy (2015, section 3) where S is everything. A mask takes
positions out of S. Across replicas, |S|, mu and var are those of all replicas together, and so
are dbeta and dgamma in the last line.

Only x and vectors are kept for the gradient; the sample is taken again.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.training.sampling import Moments, Sampling

Tensor = Any

_ROOMS = {
    name: f"mbn_rewrite.training.{name}.sampled_batch_norm"
    for name in ("tensorflow", "jax", "torch")
}


class Backend(Protocol):
    """A backend's room: the functions of its module `sampled_batch_norm`."""

    def normalize_by_sample(
        self,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        sampling: Sampling,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Moments]:
        """Batch normalisation in training, with the gradient above.

        Args:
            x: shape [N, ..., C] or [N, C, ...], of rank 2 to 5; float16, bfloat16, float32 or
                float64.
            gamma, beta: shape [C], float32 (float64 for such an input).
            sampling: where statistics are taken.
            mask: true where positions count, of shape [N, ...], without the channels; or None.

        Returns:
            y, of the shape and dtype of x, and the statistics, through which no gradient flows.
            Of no positions (an empty batch, everything masked) their count is 0.
        """

    def normalize(
        self,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        variance: Tensor,
        sampling: Sampling,
    ) -> Tensor:
        """Batch normalisation by given statistics, as at inference; see `normalize_by_sample`.

        Differentiable with respect to all tensors, by the backend's own gradients.
        """

    def implementation(
        self, x: Tensor, sampling: Sampling, mask: Tensor | None = None, *, training: bool
    ) -> str:
        """In words, what `normalize_by_sample` (in training) or `normalize` runs for this input.

        It is decided by the code that chooses what runs, here and now.
        """

    def check_input(self, x: Tensor, moving_mean: Tensor, label: str) -> None:
        """Checks what a layer is given, before it is cast, beside a weight of the layer's.

        Args:
            label: how messages name the layer.

        Raises:
            RewriteError: it is not dense, or lies where the layer does not.
        """

    def check_synchronized(self, label: str) -> None:
        """Checks, in training with `synchronized=True`, that all replicas' statistics can be had.

        Raises:
            RewriteError: they cannot.
        """


def named(name: str, who: str) -> Backend:
    """The room of a backend of Keras.

    Args:
        name: as `keras.backend.backend()` gives it; "tensorflow" for tf_keras.
        who: how messages name the layer.

    Raises:
        RewriteError: there is none for this backend, or what it needs cannot be imported.
    """
    if name not in _ROOMS:
        raise RewriteError(
            f"{who} needs Keras 3 on {', '.join(list(_ROOMS)[:-1])} or {list(_ROOMS)[-1]}; it "
            f"runs on {name}. Set KERAS_BACKEND=tensorflow (or another of these) before Keras is "
            "imported"
        )
    try:
        return cast(Backend, importlib.import_module(_ROOMS[name]))
    except ImportError as error:
        raise RewriteError(
            f"{who} cannot run on Keras's backend {name}, whose package cannot be imported here: "
            f"{cause_of(error)} Install it, or set KERAS_BACKEND to another of "
            f"{', '.join(_ROOMS)} before Keras is imported"
        ) from error
