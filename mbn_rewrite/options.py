"""Options of a rewrite, checked: the mode, strides, how the model will be run, how to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.training import strides

Mode = Literal["auto", "fold", "depthwise", "strided", "mbn"]

MODES: dict[Mode, str] = {
    "auto": "fold, and do with what is left whatever measures fastest on this machine",
    "fold": "every BatchNormalization is absorbed by its neighbours where that is exact",
    "depthwise": "every BatchNormalization becomes a depthwise 1x1 convolution",
    "strided": "for training: BatchNormalization with statistics of a sample",
    "mbn": "for training: statistics of a sample, and a trainable depthwise 1x1 convolution",
}
assert set(MODES) == set(get_args(Mode))
TRAINING_MODES = ("strided", "mbn")

DTYPES = ("float16", "bfloat16")
DEFAULT_BUDGET = 60.0  # seconds, for mode "auto"
DEFAULT_SECONDS = 10.0  # for `measure`


@dataclass(frozen=True)
class RunConfig:
    """Conditions under which a model will run.

    Attributes:
        batch_size: examples in a call.
        jit_compile: whether XLA compiles it.
        dtype: None to compute as the model says; "float16" or "bfloat16" for TensorFlow's
            automatic mixed precision, which takes float16 on GPUs and bfloat16 on CPUs.
    """

    batch_size: int = 1
    jit_compile: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        size = self.batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise RewriteError(f"the batch size must be a whole number from 1 up, not {size!r}")
        if self.dtype not in (None, *DTYPES):
            raise RewriteError(
                f"a model is measured as it is (dtype=None), or with mixed precision of "
                f"{' or '.join(DTYPES)}, not of {self.dtype!r}"
            )
        if self.dtype and self.jit_compile:
            raise RewriteError(
                "automatic mixed precision has no effect on what XLA compiles. Give dtype or "
                "jit_compile, or build the model with the dtype policy that it will have"
            )

    def __str__(self) -> str:
        compiled = ", compiled by XLA" if self.jit_compile else ""
        mixed = f", mixed precision of {self.dtype}" if self.dtype else ""
        return f"batch {self.batch_size}{compiled}{mixed}"


def _silent(line: str) -> None:
    """Reports no progress."""


@dataclass(frozen=True)
class Options:
    """Options of a rewrite.

    Attributes:
        mode: one of `MODES`.
        stride: for modes of training: a stride, or a mapping or function from layer names to
            strides.
        run_config: how the model will be run, for mode "auto".
        inputs: what to call the model with, in mode "auto" cut to the batch size; None to make
            them up.
        budget: the most seconds to take for measuring, about.
        progress: called with a line when a step begins.
        check: whether to compare the result with the original.
        measure: whether to measure how much faster than the original the result is.
        equalize: in mode "fold", whether scales between layers are chosen for int8, and what
            stays leaves its scale to them.
        keep_shared: whether no call of a shared layer may get weights of its own.
        keep_compiled: in modes of training, whether the result is compiled as the original is, and
            its optimizer has the state of the original's.
    """

    mode: str = "auto"
    stride: Any = None
    run_config: RunConfig = field(default_factory=RunConfig)
    inputs: Any = None
    budget: float = DEFAULT_BUDGET
    progress: Callable[[str], None] = _silent
    check: bool = True
    measure: bool = False
    equalize: bool = False
    keep_shared: bool = False
    keep_compiled: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.budget, (int, float)) or not self.budget > 0:
            raise RewriteError(
                f"the budget must be a number of seconds above 0, not {self.budget!r}. To measure "
                'nothing, use mode="fold"'
            )


def checked_options(
    mode: str,
    stride: Any = None,
    *,
    inputs: Any = None,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
    batch_size: int | None = None,
    jit_compile: bool | None = None,
    dtype: str | None = None,
    budget: float | None = None,
    measure: bool = False,
    equalize: bool = False,
    keep_shared: bool = False,
    keep_compiled: bool = False,
) -> Options:
    """The options that keyword arguments of the public functions stand for.

    Args:
        mode, stride, ...: as for `convert`.

    Raises:
        RewriteError: there is no such mode; it takes no stride, or measures nothing, but was given
            something for that; or what was given makes no sense.
    """
    stride = _checked_stride(mode, stride)
    if measure and mode in TRAINING_MODES:
        raise RewriteError(
            f'mode "{mode}" is for training, and what is measured is inference. Leave measure out'
        )
    if equalize and mode != "fold":
        raise RewriteError(f'only mode "fold" takes equalize, not "{mode}"')
    if keep_compiled and mode not in TRAINING_MODES:
        raise RewriteError(
            f'mode "{mode}" is for inference, so it takes no keep_compiled. Leave that out; modes '
            f"that train on: {' and '.join(TRAINING_MODES)}"
        )
    running = {"batch_size": batch_size, "jit_compile": jit_compile, "dtype": dtype}
    unused = {
        **({} if measure else running),
        # With a check, modes that measure nothing have a use for inputs all the same.
        "inputs": None if check or measure else inputs,
        "budget": budget,
    }
    given = [name for name, value in unused.items() if value is not None]
    if mode != "auto" and given:
        instead = "" if measure else ", or measure=True"
        raise RewriteError(
            f'mode "{mode}" measures nothing, so it takes no {" and no ".join(given)}. Leave that '
            f'out, or use mode="auto"{instead if set(given) & set(running) else ""}'
        )
    return Options(
        mode,
        stride,
        RunConfig(1 if batch_size is None else batch_size, bool(jit_compile), dtype),
        inputs,
        DEFAULT_BUDGET if budget is None else budget,
        progress or _silent,
        check,
        measure,
        equalize,
        keep_shared,
        keep_compiled,
    )


def _checked_stride(mode: str, stride: Any) -> Any:
    """The stride to use in a mode."""
    if mode not in MODES:
        listed = "; ".join(f'"{name}": {what}' for name, what in MODES.items())
        raise RewriteError(f"there is no mode {mode!r}. The modes are {listed}")
    if mode not in TRAINING_MODES:
        if stride is None:
            return None
        raise RewriteError(
            f'mode "{mode}" takes no stride (it was given {stride!r}): it does not compute '
            f"statistics. Modes that take one: {' and '.join(TRAINING_MODES)}"
        )
    if stride is None:
        return strides.DEFAULT_STRIDE
    # What mappings and functions give is checked layer by layer.
    return stride if isinstance(stride, Mapping) or callable(stride) else strides.checked(stride)
