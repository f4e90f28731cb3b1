"""What a file of a Keras would run when its model is made, found in its configurations.

A configuration names classes and functions, and loading a file calls them: layers that call
functions of TensorFlow by name, byte code, functions and classes of any module. Only what is
known to compute may run for a file that is not trusted: what is listed here, what Keras itself
makes models of, and what its user has registered or imported. `check` works on parsed JSON
without TensorFlow; `check_objects` looks up, right before loading, what names stand for.
"""

from __future__ import annotations

import base64
import importlib
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.limits import CONFIG_DEPTH

# ------------------------------------------------------------- functions that only compute


# Modules of TensorFlow whose functions compute and do nothing else.
_MODULES = (
    *("__operators__", "audio", "bitwise", "dtypes", "image", "linalg", "math", "nn", "ragged"),
    *("sets", "signal", "sparse", "strings"),
    *("keras.activations", "keras.losses", "keras.metrics", "keras.ops"),
)
# Functions of its other modules that do.
_FUNCTIONS = re.compile(
    "|".join(
        (
            r"random\.(categorical|gamma|normal|poisson|shuffle|truncated_normal|uniform)",
            r"random\.(stateless_\w+|split|fold_in)",
            r"debugging\.(Assert|assert_\w+|check_numerics|is_numeric_tensor)",
            r"io\.(decode|encode|parse|serialize|deserialize)_\w+|io\.(is_jpeg|extract_jpeg_shape)",
            r"quantization\.(de)?quantize(_and_dequantize(_v2)?)?|quantization\.fake_quant_\w+",
            r"quantization\.quantized_concat|nest\.(flatten|pack_sequence_as)",
            r"keras\.backend\.(abs|all|any|arange|arg(max|min)|batch_\w+|bias_add|cast(_to_floatx)?)",
            r"keras\.backend\.(categorical_\w+|binary_\w+|clip|concatenate|constant|conv\w+|cos|ctc_\w+)",
            r"keras\.backend\.(cum(prod|sum)|depthwise_conv2d|dot|dropout|elu|equal|exp|expand_dims)",
            r"keras\.backend\.(eye|flatten|gather|greater(_equal)?|hard_sigmoid|identity|in_top_k)",
            r"keras\.backend\.(int_shape|l2_normalize|less(_equal)?|log|max(imum)?|mean|min(imum)?)",
            r"keras\.backend\.(ndim|normalize_batch_in_training|not_equal|one_hot|ones(_like)?)",
            r"keras\.backend\.(permute_dimensions|pool[23]d|pow|prod|random_\w+|relu|repeat\w*)",
            r"keras\.backend\.(reshape|resize_\w+|reverse|round|separable_conv\w+|shape|sigmoid)",
            r"keras\.backend\.(sign|sin|softmax|softplus|softsign|sparse_\w+|spatial_\w+|sqrt|square)",
            r"keras\.backend\.(squeeze|stack|std|stop_gradient|sum|switch|tanh|temporal_padding|tile)",
            r"keras\.backend\.(to_dense|transpose|truncated_normal|var|zeros(_like)?)",
            # those without a module
            r"abs|acosh?|add(_n)?|approx_top_k|arg(max|min|sort)|as_string|asinh?|assert_\w+|atan[2h]?",
            r"batch_to_space(_nd)?|bincount|bitcast|boolean_mask|broadcast_(dynamic|static)_shape",
            r"broadcast_to|cast|ceil|cholesky(_solve)?|clip_by_\w+|complex|concat|conj|constant|conv",
            r"confusion_matrix|convert_to_tensor(_or_\w+)?|cosh?|cross|cum(prod|sum)|decode_\w+",
            r"depth_to_space|dequantize|diag(_part)?|digamma|div(ide)?(_no_nan)?|dynamic_(partition|stitch)",
            r"edit_distance|eig(vals)?|einsum|encode_base64|ensure_shape|equal|erfc?|exp(m1)?",
            r"expand_dims|extract_(image|volume)_patches|eye|fake_quant_\w+|i?r?fft(2d|3d|nd)?|fill",
            r"fingerprint|floor(div|mod|_div)?|gather(_nd)?|global_norm|greater(_equal)?|guarantee_const",
            r"histogram_fixed_width(_bins)?|identity(_n)?|igammac?|imag|invert_permutation|is_(finite|inf|nan)",
            r"is_(non_decreasing|strictly_increasing|numeric_tensor|tensor)|lbeta|less(_equal)?|lgamma",
            r"lin_?space|log(1p|_sigmoid)?|logical_(and|not|or|xor)|make_ndarray|mat(mul|rix_\w+)|maximum",
            r"meshgrid|minimum|mod|multiply|multinomial|negative|no_op|norm|not_equal|one_hot|ones(_like)?",
            r"pad|parallel_stack|parse_\w+|polygamma|pow|qr|quantize(d_concat|_v2)?|range|rank|real(div)?",
            r"random_(crop|gamma|normal|poisson|shuffle|uniform)|reciprocal|reduce_\w+|regex_replace|repeat",
            r"reshape|reverse(_sequence|_v2)?|rint|roll|round|rsqrt|saturate_cast|scalar_mul|scatter_nd",
            r"searchsorted|segment_\w+|self_adjoint_\w+|sequence_mask|setdiff1d|shape(_n)?|sigmoid|sign",
            r"sinh?|size|slice|sort|space_to_(batch(_nd)?|depth)|sparse_(?!placeholder)\w+|split|sqrt|square",
            r"squared_difference|squeeze|stack|stop_gradient|strided_slice|string_\w+|substr|subtract|svd",
            r"tanh?|tensor_diag(_part)?|tensor_scatter_nd_\w+|tensordot|tile|timestamp|to_\w+|trace|transpose",
            r"tru(ediv|ncatediv|ncatemod|ncated_normal)|tuple|unique(_with_counts)?|unravel_index|unsorted_\w+",
            r"unstack|where|where_v2|zeros(_like)?|zeta|verify_tensor_all_finite",
        )
    )
)
# Among those above: they read the file that an argument names.
_READ_FILES = re.compile(r"\w+\.fixed_unigram_candidate_sampler")


def computes(symbol: str) -> bool:
    """Whether a public name of TensorFlow is that of a function that only computes."""
    name = re.sub(r"^compat\.v[12]\.", "", symbol)
    if _READ_FILES.fullmatch(name):
        return False
    module = name.rpartition(".")[0]
    listed = any(module == known or module.startswith(f"{known}.") for known in _MODULES)
    return (bool(module) and listed) or bool(_FUNCTIONS.fullmatch(name))


# -------------------------------------------------------------------- what a file may name


@dataclass(frozen=True)
class Found:
    """What loading a file would do beyond making layers.

    Attributes:
        does: in words, as in: it ...
        where: the layers and keys that lead there.
    """

    does: str
    where: str


_HOLDS_CODE = "holds code, which runs when it is loaded"
# Layers that call a function of TensorFlow by its name, which is under this key.
_CALLERS = {"TFOpLambda": "function", "SlicingOpLambda": "function", "ClassMethod": "cls_symbol"}
_METHODS = {"ClassMethod": "method_name", "InstanceMethod": "attr_name",
            "InstanceProperty": "attr_name"}  # fmt: skip
# Layers that read a file of the host, named under this key.
_READERS = {
    **dict.fromkeys(("IndexLookup", "StringLookup", "IntegerLookup"), "vocabulary"),
    **dict.fromkeys(("TextVectorization", "VocabularyFileCategoricalColumn"), "vocabulary"),
    **dict.fromkeys(("DynamicLookup", "DynamicEmbedding"), "initial_vocabulary"),
    "TFSMLayer": "filepath",
}
# Keys of feature columns that do so.
_COLUMN_FILES = ("vocabulary_file", "ckpt_to_load_from")
# Layers that hold programs of other libraries.
_PROGRAMS = ("TorchModuleWrapper", "JaxLayer", "FlaxLayer")


def check(source: object, configs: Iterable[Any]) -> None:
    """Finds what can be told without TensorFlow.

    Args:
        source: the file, for the message.
        configs: its configurations, as parsed JSON.

    Raises:
        RewriteError: loading them would run code, call a function that is not known to
            compute, or read a file of the host.
    """
    for config in configs:
        for part, where in _parts(source, config):
            name = part.get("class_name")
            names = (name,) if isinstance(name, str) else ()
            _refuse(source, _acting(part, part.get("config"), names, where))


def _refuse(source: object, found: Found | None) -> None:
    if found is not None:
        raise RewriteError(
            f"{source} {found.does} ({found.where}). If you trust whoever made it, pass --trusted "
            "(trusted=True in Python)"
        )


def _parts(source: object, config: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """All dictionaries in a configuration, with the way to each in words.

    How a model was compiled is left out at the top: it is not loaded.
    """
    if isinstance(config, dict) and "compile_config" in config:
        config = {key: value for key, value in config.items() if key != "compile_config"}
    pending: list[tuple[Any, tuple[str, ...]]] = [(config, ())]
    while pending:
        value, way = pending.pop()
        if len(way) > CONFIG_DEPTH:
            raise RewriteError(
                f"{source} holds a configuration nested more than {CONFIG_DEPTH} levels deep, "
                "which no model is. It may be damaged"
            )
        if isinstance(value, dict):
            yield value, _in_words(way)
            pending += [(inner, (*way, _label(key, inner))) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(inner, (*way, _label("", inner))) for inner in value]


def _label(key: str, value: Any) -> str:
    """A step on the way to a part: the layer that begins there, or else the key."""
    if isinstance(value, dict) and isinstance(value.get("class_name"), str):
        inner = value.get("config")
        name = inner.get("name") if isinstance(inner, dict) else None
        return f"{value['class_name']} '{name}'" if isinstance(name, str) else value["class_name"]
    return "" if key in ("config", "layers") else str(key)


def _in_words(way: tuple[str, ...]) -> str:
    told = [step for step in way if step]
    return " > ".join(told[-6:]) or "the model"


def _acting(part: dict[str, Any], config: Any, names: Iterable[str], where: str) -> Found | None:
    """What an object would do when it is made, by the names of its class."""
    names = set(names)
    if "__lambda__" in names or _has_byte_code(part):
        return Found(_HOLDS_CODE, where)
    if names.intersection(_PROGRAMS):
        return Found(_HOLDS_CODE, where)
    if not isinstance(config, dict):
        return None
    for name in names:
        if name in _CALLERS:
            symbol = config.get(_CALLERS[name])
            allowed = isinstance(symbol, str) and (
                symbol in _OBJECTS if name == "ClassMethod" else computes(symbol) or _is_raw(symbol)
            )
            if not allowed:
                return Found(f"calls tf.{symbol}, which is not known to compute only", where)
        if name in _METHODS and not _is_plain(config.get(_METHODS[name])):
            return Found(f"calls the method {config.get(_METHODS[name])}", where)
        files = [_READERS[name]] if name in _READERS else []
        files += _COLUMN_FILES if name.endswith("Column") else []
        for key in files:
            if isinstance(config.get(key), str) and config[key]:
                return Found(f"reads {config[key]!r} when it is loaded", where)
    return None


# Classes of TensorFlow whose methods only compute.
_OBJECTS = ("RaggedTensor", "SparseTensor", "compat.v1.SparseTensor", "sparse.SparseTensor")


def _is_raw(symbol: str) -> bool:
    return symbol.startswith("raw_ops.")  # `check_objects` looks at the operation


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_")


def _has_byte_code(part: dict[str, Any]) -> bool:
    """Whether a dictionary has a function as byte code.

    Keras 2 writes its type beside it, and of functions in arguments of layers nothing else.
    """
    if set(part) == {"value"} and _is_byte_code(part["value"]):
        return True
    return any(
        part[key] == "lambda"
        and isinstance(part.get(key[: -len("_type")]), (str, list, dict))
        and part[key[: -len("_type")]]
        for key in part
        if key.endswith("_type")
    )


def _is_byte_code(value: Any) -> bool:
    """Whether a value is code, defaults and closure, the code as marshal has it in base64."""
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        return False
    try:
        return base64.b64decode(value[0][:4]).startswith((b"\xe3", b"c"))
    except ValueError:
        return False


# --------------------------------------------------------------------- what names stand for


# What Keras writes for values that are no objects of a class or that it makes itself.
_VALUES = {
    *("__tensor__", "__numpy__", "__bytes__", "__slice__", "__ellipsis__", "__tuple__"),
    *("__keras_tensor__", "__lambda__", "TensorShape", "TypeSpec", "CompositeTensor"),
}
# Where Keras keeps the classes and functions that old files name without a module.
_PLACES = (
    *("layers", "models", "activations", "initializers", "regularizers", "constraints"),
    *("losses", "metrics", "optimizers", "optimizers.schedules", "mixed_precision"),
)


def check_objects(source: object, configs: Iterable[Any], keras: Any) -> None:
    """Finds out what the names in configurations stand for, by importing nothing but Keras.

    Args:
        source: the file, for the message.
        configs: its configurations, which `check` has let pass.
        keras: the package that is to load it.

    Raises:
        RewriteError: one stands for something that a model is not made of, or is not loaded.
    """
    for config in configs:
        for part, where in _parts(source, config):
            name = part.get("class_name")
            if isinstance(name, str) and name not in _VALUES and "config" in part:
                _refuse(source, _acting_operation(part["config"], (name,), where))
                for found in _candidates(source, part, where, keras):
                    _refuse(source, _unfit(found, part["config"], where, keras))


def _candidates(source: object, part: dict[str, Any], where: str, keras: Any) -> list[Any]:
    """All that Keras may take the name in a dictionary for."""
    name = part["class_name"]
    if name == "function":
        name = key = part["config"]
    elif name == "__typespec__":
        name, key = part.get("spec_name"), part.get("registered_name")
    else:
        key = part.get("registered_name", name)
    if not isinstance(name, str):
        return []  # which Keras refuses
    module = part.get("module")
    registered = _registered(keras, key)
    if not isinstance(module, str):
        # Old files name a class and nothing else.
        other = _registered(keras, name)
        others = _anywhere(keras, name) if other is None else [_Users(other)]
        return [*others, *([] if registered is None else [_Users(registered)])]
    if registered is not None:
        return [_Users(registered)]
    names = [name, key] if isinstance(key, str) else [name]
    if module.partition(".")[0] in ("keras", "tf_keras", "builtins"):
        return _of_keras(keras, module, names)
    if module not in sys.modules:
        raise RewriteError(
            f"{source} names {module}.{name} ({where}), which is not loaded. Import the module "
            f"that defines it first (--import_modules={module})"
        )
    return [x for x in (_attribute(sys.modules[module], name) for name in names) if x is not None]


@dataclass(frozen=True)
class _Users:
    """What the user has registered with Keras."""

    found: Any


def _registered(keras: Any, name: Any) -> Any:
    return keras.saving.get_registered_object(name) if isinstance(name, str) else None


def _unfit(found: Any, config: Any, where: str, keras: Any) -> Found | None:
    """Why a model should not be made of what a name stands for."""
    is_users = isinstance(found, _Users)
    if is_users:
        found = found.found
    elif not _is_for_models(found, keras):
        what = f"{getattr(found, '__module__', '')}.{getattr(found, '__name__', found)}"
        return Found(f"names {what}, which models are not made of", where)
    if not isinstance(found, type):
        return None
    names = [cls.__name__ for cls in found.__mro__]
    return _acting({}, config, names, where) or _acting_operation(config, names, where)


def _acting_operation(config: Any, names: Iterable[str], where: str) -> Found | None:
    """What an operation does that a layer runs as it is."""
    from mbn_rewrite.frontends import effects

    if not isinstance(config, dict):
        return None
    op = None
    if "TensorFlowOpLayer" in names:
        node = config.get("node_def")
        # As a text it would be bytes, which Keras takes but does not write.
        op = str(node.get("op")) if isinstance(node, dict) else "?"
    elif "TFOpLambda" in names and _is_raw(str(config.get("function"))):
        op = str(config["function"]).removeprefix("raw_ops.")
    if op is None or (op != "?" and not effects.acts(op)):
        return None
    return Found(f"runs the operation {op}, which does more than compute", where)


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _of_keras(keras: Any, module: str, names: Iterable[str]) -> list[Any]:
    """All that Keras may take a name in one of its own modules for."""
    package = keras.__name__
    found = []
    own = module.split(".", 1)[1] if "." in module else ""
    for name in names:
        public = f"{own}.{name}" if own else name
        found.append(_attribute(keras, public))
        if module == "builtins":
            found += [*_anywhere(keras, name), getattr(sys.modules["builtins"], name, None)]
        else:
            found.append(_attribute(_imported(f"{package}.{own}" if own else package), name))
            found.append(_symbol(package, f"keras.{public}"))
    return [each for each in found if each is not None]


def _anywhere(keras: Any, name: str) -> list[Any]:
    found = [_attribute(keras, f"{place}.{name}") for place in _PLACES]
    found += [_attribute(_imported(f"{keras.__name__}.src.{place}"), name) for place in _PLACES]
    return [each for each in found if each is not None]


@cache
def _imported(module: str) -> Any:
    """A module of Keras, or None where there is none of that name."""
    try:
        return importlib.import_module(module)
    except (ImportError, ValueError, TypeError):
        return None


def _symbol(package: str, name: str) -> Any:
    """What a Keras has exported under a public name."""
    if package == "keras":
        from keras.src.api_export import get_symbol_from_name
    else:
        from tensorflow.python.util.tf_export import get_symbol_from_name
    return get_symbol_from_name(name)


def _is_for_models(found: Any, keras: Any) -> bool:
    """Whether models are made of such: classes of known kinds, and functions that compute."""
    if isinstance(found, type):
        return issubclass(found, _kinds(keras)) or _is_a_value(found)
    if not isinstance(found, types.FunctionType):
        return isinstance(found, types.ModuleType)  # which nothing can be made with
    return _computes(found) or _is_users(found.__module__)


@cache
def _kinds(keras: Any) -> tuple[type, ...]:
    """The classes whose objects models consist of."""
    paths = (
        *("layers.Layer", "initializers.Initializer", "regularizers.Regularizer", "Operation"),
        *("constraints.Constraint", "losses.Loss", "metrics.Metric", "optimizers.Optimizer"),
        *("optimizers.schedules.LearningRateSchedule", "optimizers.legacy.Optimizer"),
        *("mixed_precision.Policy", "DTypePolicy", "dtype_policies.DTypePolicyMap"),
        *("quantizers.Quantizer", "quantizers.QuantizationConfig", "random.SeedGenerator"),
        *("layers.InputSpec", "KerasTensor"),
    )
    found = [_attribute(keras, path) for path in paths]
    return tuple(each for each in found if isinstance(each, type))


def _is_a_value(cls: type) -> bool:
    """Whether a class describes tensors, features or first values, and only holds numbers.

    Old files name initializers without a module, which may be those of TensorFlow.
    """
    if cls.__module__.endswith(".feature_space"):
        return True
    of_tensorflow = cls.__module__.startswith("tensorflow.")
    names = ("TypeSpec", "FeatureColumn", *(("Initializer",) if of_tensorflow else ()))
    return any(base.__name__ in names for base in cls.__mro__)


def _computes(function: types.FunctionType) -> bool:
    """Whether a function of Keras or TensorFlow is one that layers call to compute."""
    package, _, rest = function.__module__.partition(".src.")
    if package in ("keras", "tf_keras"):
        return rest.partition(".")[0] in (
            "activations", "initializers", "regularizers", "constraints", "losses", "metrics", "ops"
        )  # fmt: skip
    if not function.__module__.startswith("tensorflow."):
        return False
    from tensorflow.python.util.tf_export import get_canonical_name_for_symbol

    name = get_canonical_name_for_symbol(function, add_prefix_to_v1_names=True)
    return name is not None and computes(name)


def _is_users(module: str) -> bool:
    """Whether a module is the user's own: neither the system's nor anybody's library."""
    loaded = sys.modules.get(module)
    place = getattr(loaded, "__file__", None)
    if not place or module.partition(".")[0] in ("mbn_rewrite", "tools", "__main__"):
        return False
    libraries = [
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    return not any(place.startswith(f"{library}/") for library in libraries)
