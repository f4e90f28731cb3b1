#!/usr/bin/env python3
"""Rewrites random models, or damaged files, until stopped, and checks each.

    python tests/fuzz.py [--seconds=600] [--seed=1] [--keras=keras] [--target=kills]

Prints the seed that it starts from. A failure prints the seed of its model and how to
repeat it, and is counted; the fuzzer goes on. Exit code 1 if anything failed.

Targets: "models" rewrites random models; "holders" checks that wrapping random models into layers
that call others changes no decision; "kills" ends the command-line tool by signals at
random moments, and checks what it says and what it leaves; "files" rewrites damaged model files,
each of which must be refused or written. Those that make TensorFlow or HDF5 crash or hang are
said and not counted: the tool has a process for them.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # tests/keras is not Keras
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable

from absl import app, flags

from mbn_rewrite.cli.quiet import import_tensorflow

FLAGS = flags.FLAGS
flags.DEFINE_float("seconds", float("inf"), "How long to go on; by default until Ctrl-C.")
flags.DEFINE_integer("seed", None, "The seed of the first model; by default from the clock.")
flags.DEFINE_enum("keras", "tf_keras", ["tf_keras", "keras"], "The Keras of the models.")
flags.DEFINE_integer("models", 0, "Stop after so many models, kills or files; 0 for no limit.")
flags.DEFINE_enum("target", "models", ["models", "holders", "kills", "files"], "What to try.")


def _of_models() -> Callable[[int], None]:
    from tests.support import kerases
    from tests.support.checks import check_rewrites
    from tests.support.random_models import random_model

    def check(seed: int) -> None:
        try:
            kerases.use(FLAGS.keras)
            case = random_model(seed)
            check_rewrites(case.model, case.inputs, ("fold", "depthwise"), case.needs_xla)
        finally:
            kerases.clear()

    return check


def _of_holders() -> Callable[[int], None]:
    from tests.support import kerases
    from tests.support.random_holders import check_holders

    def check(seed: int) -> None:
        try:
            kerases.use(FLAGS.keras)
            check_holders(seed, kerases.package())
        finally:
            kerases.clear()

    return check


def _of_kills() -> Callable[[int], None]:
    from tests.support.kills import Kills

    return Kills().check


def _of_files() -> Callable[[int], None]:
    from tests.support.damaged_files import Attempts

    return Attempts(seconds=60).check


def main(_: list[str]) -> int:
    import_tensorflow()
    checks = {
        "models": _of_models,
        "holders": _of_holders,
        "kills": _of_kills,
        "files": _of_files,
    }
    check = checks[FLAGS.target]()
    start = time.monotonic()
    first = FLAGS.seed if FLAGS.seed is not None else int(time.time())
    seed, failed = first, []
    print(f"first seed {first}", flush=True)
    try:
        while time.monotonic() - start < FLAGS.seconds:
            if FLAGS.models and seed - first >= FLAGS.models:
                break
            try:
                check(seed)
            except Exception:
                failed.append(seed)
                traceback.print_exc()
                print(
                    f"FAILED: repeat with --target={FLAGS.target} --seed={seed} --models=1 "
                    f"--keras={FLAGS.keras}",
                    flush=True,
                )
            seed += 1
            if (seed - first) % 50 == 0:
                rate = (seed - first) / (time.monotonic() - start)
                print(
                    f"{seed - first} {FLAGS.target}, {rate:.1f} a second, {len(failed)} failed",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("stopped")
    print(f"{seed - first} {FLAGS.target} from seed {first}, {len(failed)} failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    app.run(main)
