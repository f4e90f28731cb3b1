"""Registry of the front ends, for models in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common import files as keras_files
from mbn_rewrite.frontends.protocols import FrontEnd, ModelSource
from mbn_rewrite.frontends.saved_model import files as saved_model_files


def front_end_of(model: Any) -> FrontEnd:
    """The front end for a model, chosen by where its class comes from.

    Raises:
        RewriteError: there is none for this kind of model, or it has not been built.
    """
    if isinstance(model, (str, os.PathLike)):
        raise RewriteError(
            f"a model is needed, not the path {os.fspath(model)!r}. Load it first with "
            "load_model of tf_keras or keras, or use rewrite_saved_model or the command "
            "mbn-rewrite, which take paths"
        )
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "tf_keras" in packages:
        import tf_keras

        _check_model(model, tf_keras.Model, "tf_keras")
        from mbn_rewrite.frontends.tf_keras.frontend import TfKerasFrontEnd

        return TfKerasFrontEnd()
    if "keras" in packages:
        import keras

        _check_model(model, keras.Model, "keras")
        from mbn_rewrite.frontends.keras3.frontend import Keras3FrontEnd

        return Keras3FrontEnd()
    raise RewriteError(
        f"a model of tf_keras or Keras 3 is needed, not {type(model).__name__}. "
        "Give a tf_keras.Model or keras.Model, Functional, Sequential or subclassed"
    )


def _check_model(model: Any, kind: Any, package: str) -> None:
    if not isinstance(model, kind):
        raise RewriteError(
            f"a model is needed, not the {type(model).__name__} '{getattr(model, 'name', model)}'. "
            f"Put layers in a {package}.Sequential with an input shape"
        )
    if not model.built or not (model.weights or getattr(model, "inputs", None)):
        raise RewriteError(
            f"{type(model).__name__} '{model.name}' has not been built, so it has no weights. "
            "Call it once on data, or give it an input shape"
        )


def check_source(source: Path, trusted: bool = False) -> None:
    """Finds what is wrong with a model on disk, without loading TensorFlow.

    Raises:
        RewriteError: it is missing, damaged, of another kind, or would do more than compute and
            is not trusted.
    """
    if source.is_dir():
        saved_model_files.check(source, trusted)
    else:
        keras_files.check(source, trusted)


def open_source(
    source: Path,
    trusted: bool = False,
    tags: Sequence[str] | None = None,
    signatures: Sequence[str] | None = None,
    set_input: Mapping[str, Any] | None = None,
) -> ModelSource:
    """Opens a model on disk; see `rewrite_saved_model`.

    Raises:
        RewriteError: it cannot be read, or has no such tags, signatures or inputs.
    """
    if source.is_dir():
        from mbn_rewrite.frontends.saved_model.source import SavedModelDirectory

        return SavedModelDirectory(source, tags, signatures, trusted, set_input)
    if tags is not None or signatures is not None:
        raise RewriteError(f"{source} is a file of Keras, which has no tags and signatures")
    if set_input:
        raise RewriteError(
            f"{source} is a file of Keras, which has no signatures whose inputs could be set. "
            "Leave set_input out, or give a SavedModel"
        )
    if keras_files.package_of(source) == "keras":
        from mbn_rewrite.frontends.keras3.source import Keras3File

        return Keras3File(source, trusted)
    from mbn_rewrite.frontends.tf_keras.source import TfKerasFile

    return TfKerasFile(source, trusted)
