"""Flags of the command `mbn-rewrite`, and what it says of itself."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import flags, logging  # noqa: F401 - which defines --verbosity

import mbn_rewrite
from mbn_rewrite.cli.console import say
from mbn_rewrite.options import DEFAULT_BUDGET, DEFAULT_SECONDS, DTYPES, MODES, TRAINING_MODES

_USAGE = """\
Rewrites the BatchNormalization of a model on disk, and compares and measures models.

    mbn-rewrite [FLAGS] IN OUT                 rewrites IN, verifies and measures what it wrote
    mbn-rewrite plan [FLAGS] IN                what would be done, and why a layer would stay
    mbn-rewrite verify [FLAGS] IN OUT          compares a SavedModel with what it was made from
    mbn-rewrite measure [FLAGS] MODEL [...]    latency of models, called in turn

IN is any SavedModel (of TensorFlow 1 or 2, Keras 2 or 3, frozen or not), or a .h5, .hdf5 or
.keras file of tf_keras or Keras 3. OUT is the directory of the SavedModel to write, with the
signatures, methods, assets and tables of IN. IN is never changed; OUT appears only when the
written model was loaded again and every signature that can be run gave the original's outputs. If a
folder has the name of a command, write ./plan.

Results are printed to standard output, what is being done and errors to standard error.

Examples:
    mbn-rewrite saved_model served
    mbn-rewrite plan saved_model
    mbn-rewrite measure saved_model served --batch-size=8 --threads=1 --chart=latency.png
    mbn-rewrite verify saved_model served --inputs=real_inputs.npz
    mbn-rewrite --batch-size=8 --jit-compile saved_model served
    mbn-rewrite --mode=depthwise model.keras served
    mbn-rewrite --report=report.json --overwrite model.h5 served
    mbn-rewrite --inputs=real_inputs.npz saved_model served
    mbn-rewrite --unverified=from_text,sample saved_model served
    mbn-rewrite --signatures=serving_default --tags=serve in out
    mbn-rewrite --set-input=phase_train=False saved_model served

A SavedModel is a program, and so may be what a file of Keras holds; to verify or to measure it is
to run it. It is loaded and run in a process of its own: a model that
crashes, uses up the memory or does not end (--timeout) is one line here, and leaves nothing
behind.

Exit codes:
    0    done
    1    the input cannot be read or rewritten, crashes or takes too long, the output cannot be
         written, or a flag is wrong: one line says why
    3    the rewritten model did not give the original's outputs: the numbers are printed,
         nothing is written; or verify found a difference
    129  SIGHUP, 130 SIGINT (Ctrl-C), 143 SIGTERM: interrupted; one line says whether anything
         was written
"""

EXIT_ERROR = 1

# Its own: programs that use the package may have flags of these names.
FLAGS = flags.FlagValues()  # type: ignore[no-untyped-call]
FLAGS["verbosity"] = flags.FLAGS["verbosity"]  # of absl's log
_SERVING = {mode: what for mode, what in MODES.items() if mode not in TRAINING_MODES}
flags.DEFINE_enum(
    "mode",
    "auto",
    list(_SERVING),
    "; ".join(f"{mode}: {what}" for mode, what in _SERVING.items()),
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "Examples in each call that is measured. 1 by default.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_bool("jit_compile", None, "Measure models compiled by XLA.", flag_values=FLAGS)
flags.DEFINE_enum(
    "dtype",
    None,
    list(DTYPES),
    "Measure with TensorFlow's automatic mixed precision (float16 on GPUs, bfloat16 on "
    "CPUs). By default the model computes in the dtypes that it says.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "budget",
    None,
    f"Mode auto: the most seconds to take for measuring, about. {DEFAULT_BUDGET:g} by default.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "keep_shared",
    False,
    "Modes auto and fold: give no call of a shared layer weights of its own. By default calls get "
    "them where that lets more fold and they are few; the report says how many.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "measure",
    True,
    "Measure at the end, for some seconds, how much faster OUT is here than IN. --nomeasure leaves "
    "it out.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "seconds",
    None,
    f"Command measure: how long to measure, about. {DEFAULT_SECONDS:g} by default.",
    lower_bound=0.1,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "threads",
    None,
    "Command measure: how many threads of the CPU an operation may use. One a core by default.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "chart",
    None,
    "Command measure: draw the latencies to this PNG file. Needs matplotlib.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "equalize",
    False,
    "Mode fold: choose the scales between layers, which are free, so that rounding weights to int8 "
    "with one step for each tensor loses least; what stays for its shift only adds.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "freeze",
    False,
    "Make weights constants of graphs, which may be faster. OUT then has signatures and nothing "
    "else: no variables to train or to restore, no methods. Mode auto: where that measures faster.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("dry_run", False, "As the command plan: OUT is not needed.", flag_values=FLAGS)
flags.DEFINE_bool("overwrite", False, "Replace OUT if it is a SavedModel.", flag_values=FLAGS)
flags.DEFINE_string("report", None, "Write all results to this file, as JSON.", flag_values=FLAGS)
flags.DEFINE_string(
    "inputs",
    None,
    "Verify and measure with these inputs: an .npz file with an array for each input, by its name, "
    "or by SIGNATURE/NAME where signatures differ. By default inputs are made up.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "unverified",
    [],
    "Carry over these signatures and methods without comparing what they give: where no inputs can "
    "be made up and none are at hand, or outputs differ from call to call.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "tolerance",
    None,
    "The largest error to accept, relative to the largest output. By default what rounding "
    "in the model's dtype explains.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "signatures",
    None,
    "Carry over, or compare, these signatures of a SavedModel only; measure takes the one to run. "
    "By default all, and the methods that the loaded object has; measure runs the served one.",
    flag_values=FLAGS,
)
flags.DEFINE_multi_string(
    "set_input",
    [],
    "Set an input of a signature to a value for good, as NAME=VALUE or SIGNATURE/NAME=VALUE; may "
    "be given several times. A flag that says whether the model trains then decides its branches: "
    "--set-input=phase_train=False. The signature has the input no more, and what is written is "
    "compared with the original at that value.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "tags",
    None,
    'The tags of the graph in a SavedModel that has several. By default "serve".',
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "trusted",
    False,
    "Do all that IN says: run code that a Keras file holds (Lambda layers), and operations that "
    "write or read files or run Python. A model is a program; by default only what is known to "
    "compute is run, and what is not run is not verified.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "import_modules",
    [],
    "Python modules that define the custom layers or operations of IN.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "timeout",
    600.0,
    "The most seconds that one step may take: opening, planning, running the original, writing or "
    "verifying. Measuring may take the budget beside. 0 for no limit.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "full", False, "Print every row of long tables, which are grouped otherwise.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "quiet", False, "Print errors only, and what was not verified.", flag_values=FLAGS
)


class _Shown(flags.BooleanFlag):
    """A flag that has a text printed, and ends the program well."""

    def __init__(self, name: str, text: Callable[[], str], what: str, short: str | None = None):
        super().__init__(name, False, what, short, allow_override=True)
        self._text = text

    def parse(self, argument: str | bool) -> None:
        super().parse(argument)
        if self.value:
            print(self._text())
            sys.exit(0)


def _help() -> str:
    return f"{_USAGE}\nFlags, with underscores or dashes:\n{FLAGS.module_help(__name__)}"


flags.DEFINE_flag(
    _Shown("help", _help, "Print this; so do -h and --helpshort.", "?"), flag_values=FLAGS
)
for _name in ("helpshort", "helpfull"):
    flags.DEFINE_flag(_Shown(_name, _help, ""), module_name="absl.app", flag_values=FLAGS)
flags.DEFINE_flag(
    _Shown("version", lambda: f"mbn-rewrite {mbn_rewrite.__version__}", "Print the version."),
    flag_values=FLAGS,
)
flags.DEFINE_alias("h", "help", module_name="absl.app", flag_values=FLAGS)
flags.DEFINE_alias("verify_inputs", "inputs", module_name="absl.app", flag_values=FLAGS)
flags.DEFINE_alias("json", "report", module_name="absl.app", flag_values=FLAGS)
for _flag in FLAGS.get_flags_for_module(__name__):
    if "_" in _flag.name:
        flags.DEFINE_alias(
            _flag.name.replace("_", "-"), _flag.name, module_name="absl.app", flag_values=FLAGS
        )


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; returns the rest. Ends the program where one is wrong, or asks for help."""
    flags.FLAGS.mark_as_parsed()  # absl looks at its own
    try:
        return list(FLAGS(argv))
    except flags.Error as error:
        say(f"error: {error}; --help lists the flags")
        sys.exit(EXIT_ERROR)
