"""Functions of TensorFlow that do nothing but compute, by their public names."""

from __future__ import annotations

import re

# Modules of TensorFlow whose functions do nothing but compute.
_MODULES = (
    *("__operators__", "audio", "bitwise", "dtypes", "image", "linalg", "math", "nn", "ragged"),
    *("sets", "signal", "sparse", "strings"),
    *("keras.activations", "keras.losses", "keras.metrics", "keras.ops"),
)
# Functions of its other modules of which that is true.
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
            # without a module
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
# Exceptions to the above: they read the file that an argument names.
_READ_FILES = re.compile(r"\w+\.fixed_unigram_candidate_sampler")


def computes(symbol: str) -> bool:
    """Whether a public name of TensorFlow belongs to a function that only computes."""
    name = re.sub(r"^compat\.v[12]\.", "", symbol)
    if _READ_FILES.fullmatch(name):
        return False
    module = name.rpartition(".")[0]
    listed = any(module == known or module.startswith(f"{known}.") for known in _MODULES)
    return (bool(module) and listed) or bool(_FUNCTIONS.fullmatch(name))
