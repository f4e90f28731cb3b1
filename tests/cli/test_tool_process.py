"""The tool as a process: signals, closed streams, and what there is afterwards.

What works for it is played by a small program, so that nothing here loads TensorFlow.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mbn_rewrite
from mbn_rewrite.cli.speed import next_steps

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parents[2] / "tools" / "rewrite_savedmodel.py"

WORKER = """
import json, os, socket, sys, time
channel = socket.socket(fileno=int(sys.argv[1]))
job = json.load(sys.stdin)
def say(**message): channel.sendall(json.dumps(message).encode() + b"\\n")
def write(content="new"):
    if job["folder"]:
        os.mkdir(job["folder"])
        with open(job["folder"] + "/saved_model.pb", "w") as file:
            file.write(content)
def end(how="done", text="a table", message=""):
    verification = {"ok": how == "done", "unverified": {}}
    report = {"verification": verification} if how in ("done", "different") else {}
    say(ending={"how": how, "text": text, "message": message, "report": report})
say(step={"line": "writing"})
"""

# Runs the tool as it is, but for who works for it.
DRIVER = """
import runpy, sys
from mbn_rewrite.cli import supervisor
supervisor.supervised.__defaults__ = ((sys.executable, "-S", "-c", sys.argv.pop(2)),)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

WORKS = "write(); end()\n"
WROTE = f"{next_steps(Path('out'))}\n"


@pytest.fixture
def place(tmp_path):
    """A directory with an input, and one for temporary files."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "saved_model.pb").write_text("original")
    (tmp_path / "temporary").mkdir()
    return tmp_path


SIGNALS = {signal.SIGINT: "", signal.SIGTERM: " by SIGTERM", signal.SIGHUP: " by SIGHUP"}
ROOT = str(TOOL.parent.parent)


def environment(place):
    return os.environ | {"TMPDIR": str(place / "temporary"), "PYTHONPATH": ROOT}


def heeding():
    """Where the suite runs in the background, its processes would ignore an interrupt."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def started(place, work, *arguments, preexec_fn=heeding):
    arguments = (*(arguments or ("in", "out")), "--nomeasure")
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, TOOL, WORKER + work, *arguments],
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def run(place, work, *arguments):
    """Runs it to its end; returns its exit code and what it printed on either stream."""
    process = started(place, work, *arguments)
    out, err = process.communicate()
    return process.returncode, out, err


def content_of(path):
    return (path / "saved_model.pb").read_text()


def left(place):
    """What there is in a place, and among temporary files, beside what was there before."""
    found = [path.name for path in place.iterdir() if path.name not in ("in", "temporary")]
    return sorted([*found, *(path.name for path in (place / "temporary").iterdir())])


def test_all_is_well(place):
    assert run(place, WORKS) == (0, f"a table\n{WROTE}", "writing ...\n")
    assert content_of(place / "out") == "new"
    assert left(place) == ["out"]


def test_quiet(place):
    assert run(place, WORKS, "--quiet", "in", "out") == (0, "", "")


def test_how_the_result_is_laid_out(place):
    work = "end(text=str([job[name] for name in ('width', 'encoding', 'full')]))"
    assert "[100, 'utf-8', False]" in run(place, work, "--dry-run", "in")[1]
    assert "[100, 'utf-8', True]" in run(place, work, "--dry-run", "--full", "in")[1]


def test_a_dry_run(place):
    code, out, _ = run(place, "assert not job['folder']\n" + WORKS, "--dry_run", "in")
    assert (code, out) == (0, "a table\ndry run: wrote nothing\n")
    assert left(place) == []


def test_dashes_for_underscores(place):
    arguments = ("--dry-run", "--batch-size=3", "--inputs", "some-inputs.npz", "in")
    works = "assert job['options']['batch_size'] == 3, job\n" + WORKS
    code, out, _ = run(place, "assert job['inputs'] == 'some-inputs.npz', job\n" + works,
                       *arguments)  # fmt: skip
    assert (code, out) == (0, "a table\ndry run: wrote nothing\n")


def test_what_models_print_goes_to_the_standard_error(place):
    code, out, err = run(place, "print('printed', flush=True)\n" + WORKS, "--quiet", "in", "out")
    assert (code, out, err) == (0, "", "printed\n")


def test_temporary_files_of_the_work_are_removed(place):
    work = "import tempfile; tempfile.mkdtemp(); tempfile.mkstemp()\n" + WORKS
    assert run(place, work)[0] == 0
    assert left(place) == ["out"]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("os.abort()", None),
        ("end('refused', '', 'it is damaged')", "error: it is damaged\n"),
        (
            "write(); end('unexpected', '', 'KeyError: 1')",
            "error: an unexpected error while writing: KeyError: 1; nothing was written. Please "
            "report this line, with the model if you can\n",
        ),
        ("write(); end('no memory')", None),
        ("write('half'); os._exit(3)", None),
        ("write('half'); os.kill(os.getppid() and os.getpid(), 9)", None),
        ("time.sleep(600)", None),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(work, said, place):
    code, out, err = run(place, work, "--timeout=2", "--report=r.json", "--quiet", "in", "out")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in (None, err)
    assert left(place) == []


def test_a_model_that_differs(place):
    work = "write(); end('different', 'the numbers', 'it differs')"
    code, out, err = run(place, work, "--quiet", "--report=r.json", "in", "out")
    assert (code, out, err) == (3, "", "error: it differs\nthe numbers\n")
    assert left(place) == ["r.json"]


# ------------------------------------------------------- what is said without any TensorFlow

# Runs the package as a program, and fails if that loads TensorFlow.
MODULE = """
import os, runpy, sys
leave = os._exit
os._exit = lambda code: leave(99 if "tensorflow" in sys.modules else code)
runpy.run_module("mbn_rewrite", run_name="__main__", alter_sys=True)
"""


def run_module(*arguments):
    return subprocess.run(
        [sys.executable, "-c", MODULE, *arguments],
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_has_examples_flags_and_exit_codes(flag):
    done = run_module(flag)
    assert (done.returncode, done.stderr) == (0, "")
    for said in ("mbn-rewrite saved_model served", "--[no]dry_run: ", "Exit codes"):
        assert said in done.stdout


def test_all_of_the_help_is_no_error():
    done = run_module("--helpfull")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--[no]dry_run: " in done.stdout


def test_version():
    done = run_module("--version")
    assert (done.returncode, done.stdout) == (0, f"mbn-rewrite {mbn_rewrite.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=faster", "a", "b"], "fold|depthwise"),
        (["--no-such-flag", "a", "b"], "Unknown command line flag 'no-such-flag'"),
        (["--batch-size=0", "a", "b"], "flag --batch_size=0"),
        (["--nohelp"], "give IN and OUT (got 0 paths)"),
    ],
)
def test_wrong_usage_is_one_line(arguments, said):
    done = run_module(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------- signals


def sent(process, number, after="writing ...\n"):
    """Sends a signal once a line has been printed; what is printed after that."""
    for line in process.stderr:
        if line == after:
            break
    process.send_signal(number)
    said = process.communicate()
    return process.returncode, *said


@pytest.mark.parametrize(
    ("number", "overwrite"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGHUP, False)],
)
def test_a_signal_while_it_works(number, overwrite, place):
    if overwrite:
        (place / "out").mkdir()
        (place / "out" / "saved_model.pb").write_text("old")
    process = started(place, "write(); time.sleep(600)", f"--overwrite={overwrite}", "in", "out")
    said = f"interrupted{SIGNALS[number]}: nothing was written\n"
    assert sent(process, number) == (128 + number, "", said)
    assert left(place) == (["out"] if overwrite else [])
    assert not overwrite or content_of(place / "out") == "old"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_output_is_in_its_place(number, place):
    """Nobody reads what is printed, so that it waits; what was written is said all the same."""
    process = started(place, "write(); end(text='x' * 1_000_000)", "--report=r.json", "in", "out")
    process.stdout.read(1)
    process.send_signal(number)
    code, _, err = (process.wait(), process.stdout.close(), process.stderr.read())
    process.stderr.close()
    assert (code, err) == (
        128 + number,
        f"writing ...\ninterrupted{SIGNALS[number]}: out was written\n",
    )
    assert content_of(place / "out") == "new"
    assert json.loads((place / "r.json").read_text())["verification"]["ok"]
    assert left(place) == ["out", "r.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_moments(number, place):
    """While modules are imported, of which one is made to wait."""
    package = place / "modules" / "absl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "print('importing', flush=True)\nimport time; time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, TOOL, "in", "out"],
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (128 + number, "")
    assert err == f"interrupted{SIGNALS[number]}: nothing was written\n"


def test_a_signal_that_is_to_be_ignored(place):
    """As nohup has it."""
    process = started(
        place,
        "time.sleep(0.5); " + WORKS,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    code, out, _ = sent(process, signal.SIGHUP)
    assert (code, out) == (0, f"a table\n{WROTE}")


def children_of(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in listed.split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are listed on Linux")
def test_the_run_after_one_that_was_killed_leaves_nothing(place):
    process = started(place, "import tempfile; tempfile.mkdtemp(); write(); time.sleep(600)")
    assert process.stderr.readline() == "writing ...\n"
    (worker,) = children_of(process)
    process.kill()
    process.wait()
    # This worker does not end with the tool as the real one does, and what it uses stays.
    assert run(place, WORKS, "in", "meanwhile")[0] == 0
    assert len(left(place)) == 3
    os.kill(worker, signal.SIGKILL)
    process.communicate()
    assert run(place, WORKS)[0] == 0
    assert left(place) == ["meanwhile", "out"]


def test_an_output_that_was_moved_aside_is_put_back(place):
    folder = place / ".out.mbn_rewrite.0123456789abcdef"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "saved_model.pb").write_text("old")
    mark = {"folder_of": "mbn_rewrite", "machine": os.uname().nodename, "destination": "out"}
    (folder / ".mbn_rewrite").write_text(json.dumps(mark))
    code, _, err = run(place, WORKS)
    assert code == 1
    assert err.startswith("put back ")
    assert "out exists" in err
    assert content_of(place / "out") == "old"
    assert left(place) == ["out"]


def test_two_runs_beside_each_other(place):
    first = started(place, "write(); time.sleep(1.5); end()", "in", "first")
    second = started(place, "write(); time.sleep(1.0); end()", "in", "second")
    assert run(place, WORKS, "in", "third")[0] == 0
    assert [process.communicate() and process.returncode for process in (first, second)] == [0, 0]
    assert left(place) == ["first", "second", "third"]


def test_two_runs_into_the_same_place(place):
    first = started(place, "write('first'); time.sleep(1.5); end()")
    sent_line = first.stderr.readline()
    assert sent_line == "writing ...\n"
    assert run(place, "write('second'); end()")[0] == 0
    _, err = first.communicate()
    assert first.returncode == 1
    assert "out exists" in err
    assert content_of(place / "out") == "second"
    assert left(place) == ["out"]


# -------------------------------------------------------------------------------- streams


def shell(place, redirections, work=WORKS, flags=""):
    """Runs the tool with the redirections of a shell."""
    command = f'"$0" -c "$1" "$2" "$3" --report=r.json --nomeasure {flags} in out {redirections}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, DRIVER, TOOL, WORKER + work],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    return done.returncode, done.stdout, done.stderr


LARGE = "write(); end(text='line\\n' * 100_000)"


@pytest.mark.parametrize(
    ("redirections", "code", "said"),
    [
        (">&-", 0, "writing ...\n"),
        ("2>&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("<&-", 0, "writing ...\n"),
        ("<&- >&- 2>&-", 0, ""),
        (
            ">/dev/full",
            1,
            "writing ...\nerror: out was written, but what was done cannot be printed: "
            "No space left on device.\n",
        ),
        ("2>/dev/full", 0, ""),
        (">/dev/full 2>&1", 1, ""),
        ("| head -1; exit ${PIPESTATUS[0]}", 0, "writing ...\n"),
        ("2>&1 | true; exit ${PIPESTATUS[0]}", 0, ""),
    ],
)  # fmt: skip
def test_streams_that_nobody_reads(redirections, code, said, place):
    work = LARGE if "|" in redirections else WORKS  # more than a pipe holds
    got, _, err = shell(place, redirections, work)
    assert (got, err) == (code, said)
    assert content_of(place / "out") == "new"
    assert json.loads((place / "r.json").read_text())["verification"]["ok"]
    assert left(place) == ["out", "r.json"]


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full"])
def test_errors_that_nobody_reads(redirections, place):
    assert shell(place, redirections, "write(); end('different')")[0] == 3
    assert shell(place, redirections, "os.abort()")[0] == 1
    assert shell(place, redirections, flags="--no_such_flag")[0] == 1
    assert left(place) == ["r.json"]


def test_help_that_nobody_reads(place):
    assert "Exit codes" in shell(place, "", flags="--help")[1]
    for redirections in ("| true", ">/dev/full"):
        assert "Exit codes" not in "".join(shell(place, redirections, flags="--help")[1:])


def test_a_terminal_that_knows_few_characters(place):
    env = environment(place) | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, TOOL, WORKER + "end(text='\\u2500')", "--dry_run", "in"],
        cwd=place, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "\\u2500\ndry run: wrote nothing\n")


def test_a_report_that_cannot_be_written_at_last(place):
    (place / "reports").mkdir()
    work = "os.rename('reports', 'gone'); write(); end()"
    code, out, err = run(place, work, "--report=reports/r.json", "in", "out")
    assert code == 1
    assert "out was written, but the report cannot be" in err
    assert out == f"a table\n{WROTE}"
    assert "Traceback" not in err
