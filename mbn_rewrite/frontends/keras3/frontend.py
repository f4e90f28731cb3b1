"""Front end for Keras 3 models in memory, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from mbn_rewrite.device import processor
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras3.adapter import KERAS_3, functional_of
from mbn_rewrite.frontends.keras3.writer import Keras3Writer
from mbn_rewrite.frontends.keras_common.cloning import parts
from mbn_rewrite.frontends.keras_common.frontend import KerasFrontEnd
from mbn_rewrite.frontends.sample_inputs import (
    GIVE_REAL_ONES,
    InputRecipe,
    of_batch,
    random_array,
    uncallable,
)
from mbn_rewrite.options import RunConfig

if TYPE_CHECKING:
    from mbn_rewrite.comparison import Comparison


class Keras3FrontEnd(KerasFrontEnd):
    """See `protocols.FrontEnd`; on other backends than TensorFlow, models run as they are."""

    def __init__(self) -> None:
        super().__init__(KERAS_3, Keras3Writer)

    def _input_specs(self, model: Any) -> Any:
        if KERAS_3.is_visible(model):
            return functional_of(model)._inputs_struct
        shapes = (model.get_build_config() or {}).get("input_shape")
        if shapes is None:
            raise RewriteError(
                f"no inputs can be made up for '{model.name}', whose arguments are several or not "
                f"known. {GIVE_REAL_ONES}"
            )
        if any(isinstance(layer, keras.layers.Embedding) for layer in parts(model)):
            raise RewriteError(
                f"no inputs can be made up for '{model.name}', which looks something up but does "
                f"not say of what dtype its inputs are. {GIVE_REAL_ONES}"
            )
        return keras.tree.map_shape_structure(
            lambda shape: keras.KerasTensor(shape, dtype=model.input_dtype), shapes
        )

    def _random_tensor(self, spec: Any, rng: np.random.Generator, recipe: InputRecipe) -> Any:
        if getattr(spec, "sparse", False):
            raise RewriteError(f"cannot make up inputs that are not dense. {GIVE_REAL_ONES}")
        array = random_array(tuple(spec.shape), str(spec.dtype), rng, recipe)
        return keras.ops.convert_to_tensor(array, spec.dtype)

    def _resized(self, array: Any, batch: int | None) -> Any:
        array = of_batch(keras.ops.convert_to_numpy(array), batch)
        return keras.ops.convert_to_tensor(array)

    def _value(self, variable: Any) -> Any:
        return variable.numpy()

    def _restore(self, variable: Any, value: Any) -> None:
        if not np.array_equal(variable.numpy(), value):  # assigning takes longer
            variable.assign(value)

    # -- other backends than TensorFlow ------------------------------------------------------

    def compute_dtypes(self, model: Any) -> set[str]:
        """See `protocols.FrontEnd`.

        On JAX (but for its 64 bits) and torch, Keras computes in float32 where float64 meets it, as
        in BatchNormalization.
        """
        dtypes = super().compute_dtypes(model)
        if "float64" in dtypes:
            dtypes.add(keras.backend.result_type("float64", "float32"))
        return dtypes

    def closer_look(
        self, model: Any, new: Any, inputs: Any, plain: Comparison, rounding: bool
    ) -> Comparison | None:
        if not _on_tensorflow():
            return None  # only TensorFlow has graphs to look into
        return super().closer_look(model, new, inputs, plain, rounding)

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        if _on_tensorflow():
            return super().set_up(run_config)
        if run_config.jit_compile or run_config.dtype:
            raise RewriteError(
                f"Keras runs on {keras.backend.backend()}, where models are measured as they are "
                "called. Give neither jit_compile nor dtype, or set KERAS_BACKEND=tensorflow"
            )
        return nullcontext()

    def device(self) -> str:
        if _on_tensorflow():
            return super().device()
        return f"{_accelerator() or processor()}, Keras on {keras.backend.backend()}"

    def _called(self, function: Callable[[Any], Any], inputs: Any, who: str) -> list[np.ndarray]:
        if _on_tensorflow():
            return super()._called(function, inputs, who)
        try:
            with _full_products():
                outputs = keras.tree.flatten(function(inputs))
        except Exception as error:
            raise uncallable(who, error) from error
        return [keras.ops.convert_to_numpy(output) for output in outputs]

    def _runner(
        self, function: Callable[[Any], Any], inputs: Any, run_config: RunConfig
    ) -> Callable[[], object]:
        if _on_tensorflow():
            return super()._runner(function, inputs, run_config)
        return lambda: self._called(function, inputs, "it")


def _accelerator() -> str:
    """The name of the device that JAX or torch runs on, or "" for the processor."""
    if keras.backend.backend() == "jax":
        import jax

        return "" if jax.default_backend() == "cpu" else str(jax.devices()[0].device_kind)
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return ""


@contextmanager
def _full_products() -> Iterator[None]:
    """Context manager in which JAX and torch multiply float32 in full precision on GPUs.

    See `execution`, which does so for TensorFlow.
    """
    if keras.backend.backend() == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            yield
    elif keras.backend.backend() == "torch":
        import torch

        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
    else:
        yield


def _on_tensorflow() -> bool:
    return bool(keras.backend.backend() == "tensorflow")
