"""Rewrites BatchNormalization in TensorFlow models.

    import mbn_rewrite as mbn

    print(mbn.plan(model, mode="fold"))   # what folds, what does not, and why
    new = mbn.convert(model)              # same outputs, without or with faster BatchNormalization
    print(mbn.verify(model, new))         # the two compared
    print(mbn.measure(model, new))        # how long a call of each takes, here

Importing this package loads neither TensorFlow nor Keras; they come with the first call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mbn_rewrite.registration import register_layers

if TYPE_CHECKING:
    from mbn_rewrite.api import convert, convert_with_plan, plan
    from mbn_rewrite.comparison import Comparison
    from mbn_rewrite.errors import RewriteError, VerificationError
    from mbn_rewrite.latency import measure
    from mbn_rewrite.measurement import Latencies, Measurement
    from mbn_rewrite.options import Mode
    from mbn_rewrite.plans import Decision, Plan
    from mbn_rewrite.report import Report
    from mbn_rewrite.rewrite import rewrite_saved_model, verify_saved_model
    from mbn_rewrite.training.layers import (
        ModifiedBatchNormalization,
        StridedBatchNormalization,
    )
    from mbn_rewrite.verification import verify

__version__ = "0.1.0"

# The whole public surface: each name and the module that defines it.
_PUBLIC = {
    "Comparison": "comparison",
    "Decision": "plans",
    "Latencies": "measurement",
    "Measurement": "measurement",
    "Mode": "options",
    "ModifiedBatchNormalization": "training.layers",
    "Plan": "plans",
    "Report": "report",
    "RewriteError": "errors",
    "StridedBatchNormalization": "training.layers",
    "VerificationError": "errors",
    "convert": "api",
    "convert_with_plan": "api",
    "measure": "latency",
    "plan": "api",
    "rewrite_saved_model": "rewrite",
    "verify_saved_model": "rewrite",
    "verify": "verification",
}

__all__ = [
    "Comparison",
    "Decision",
    "Latencies",
    "Measurement",
    "Mode",
    "ModifiedBatchNormalization",
    "Plan",
    "Report",
    "RewriteError",
    "StridedBatchNormalization",
    "VerificationError",
    "convert",
    "convert_with_plan",
    "measure",
    "plan",
    "rewrite_saved_model",
    "verify",
    "verify_saved_model",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


register_layers()
