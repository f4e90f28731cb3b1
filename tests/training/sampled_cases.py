"""Cases of sampled statistics, and what they have to give, in numpy alone: for every backend."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from mbn_rewrite.training.sampling import Sampling

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
    synchronized: bool = False

    @property
    def sampling(self):
        return Sampling(self.axis, self.strides, EPSILON, self.synchronized, self.depthwise)

    @property
    def wide(self):
        """The dtype of statistics and weights."""
        return "float64" if self.dtype == "float64" else "float32"

    def arrays(self, seed=0):
        """x, dy, gamma, beta and the mask, or None; x and dy are to be cast."""
        rng = np.random.default_rng(seed)
        channels = self.shape[self.axis]
        mask_shape = [size for i, size in enumerate(self.shape) if i != self.axis]
        mask = rng.random(mask_shape) < 0.7
        mask.flat[0] = True
        return (
            (rng.standard_normal(self.shape) * 2 + 1).astype(self.wide),
            rng.standard_normal(self.shape).astype(self.wide),
            rng.standard_normal(channels).astype(self.wide),
            rng.standard_normal(channels).astype(self.wide),
            mask if self.masked else None,
        )

    def expected(self, x, dy, gamma, beta, mask):
        """What `NAMES` say, in float64, by the equations of `training.backends`."""
        rank = len(self.shape)
        x, dy, gamma, beta = (np.asarray(a, np.float64) for a in (x, dy, gamma, beta))
        along = [-1 if i == self.axis else 1 for i in range(rank)]
        axes = tuple(i for i in range(rank) if i != self.axis)
        taken = np.zeros(self.shape)
        taken[tuple(slice(None, None, step) for step in self.sampling.steps(rank))] = 1
        if mask is not None:
            taken *= np.expand_dims(mask, self.axis)
        count = np.sum(np.moveaxis(taken, self.axis, 0)[0])
        mean = np.sum(taken * x, axes) / count
        centred = x - mean.reshape(along)
        variance = np.sum(taken * centred**2, axes) / count
        inverse = 1 / np.sqrt(variance + EPSILON)
        xhat = centred * inverse.reshape(along)
        dbeta, dgamma = np.sum(dy, axes), np.sum(dy * xhat, axes)
        due = taken / count * (dbeta.reshape(along) + xhat * dgamma.reshape(along))
        y = xhat * gamma.reshape(along) + beta.reshape(along)
        dx = (gamma * inverse).reshape(along) * (dy - due)
        return y, dx, dgamma, dbeta, mean, variance, count

    def check(self, arrays, got, expected):
        """Asserts that results are the expected ones, up to rounding."""
        x, dy, gamma = (np.abs(np.asarray(a, np.float64)) for a in arrays[:3])
        slope = np.max(gamma) / np.sqrt(np.min(expected[5]) + EPSILON)
        spread = np.sqrt(dy.size) * np.max(dy)  # of a sum over positions
        # What is summed, where the sum may cancel.
        terms = {"dx": slope * np.max(dy), "dgamma": spread, "dbeta": spread}
        terms |= {"mean": np.max(x), "variance": np.max(x) ** 2}
        for name, a, b in zip(NAMES, got, expected, strict=True):
            largest = max(np.max(np.abs(b)), terms.get(name, 0))
            error = np.max(np.abs(np.asarray(a, np.float64) - b)) / largest
            dtype = self.dtype if name in ("y", "dx") else self.wide
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
    "depthwise": Case((4, 12, 8, 8), 3, (2, 2), depthwise=True),
    "depthwise_everything": Case((4, 12, 8, 8), 3, (1, 1), depthwise=True),
    "synchronized": Case((4, 12, 8, 8), 3, (2, 2), synchronized=True),
    "synchronized_everything": Case((4, 12, 8, 8), 3, (1, 1), synchronized=True),
}


@st.composite
def cases(draw):
    """Random cases, of every rank."""
    rank = draw(st.integers(2, 5))
    last = draw(st.booleans())
    spatial = draw(st.lists(st.integers(1, 9), min_size=rank - 2, max_size=rank - 2))
    batch, channels = draw(st.integers(2, 4)), draw(st.integers(1, 9))
    shape = (batch, *spatial, channels) if last else (batch, channels, *spatial)
    return Case(
        shape,
        rank - 1 if last else 1,
        tuple(draw(st.integers(1, 5)) for _ in spatial),
        draw(st.sampled_from(["float32", "float64"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )
