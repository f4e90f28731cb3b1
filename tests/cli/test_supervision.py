"""The process that works for the tool: crashes, time limits, signals, and what is left behind.

What works is played by small programs, so that nothing here loads TensorFlow.
"""

import os
import signal
import sys
import threading
import time

import pytest

from mbn_rewrite.cli.interrupts import Interrupted, Interrupts
from mbn_rewrite.cli.job import (
    DIFFERENT,
    DONE,
    NO_MEMORY,
    UNEXPECTED,
    Ending,
    Job,
    Step,
    ending_to_json,
    step_to_json,
)
from mbn_rewrite.cli.supervisor import Limits, supervised
from mbn_rewrite.errors import RewriteError

pytestmark = pytest.mark.slow

JOB = Job("in", "out", "folder/new")
# What each program begins with: its socket, and the job that it has been given.
BEGIN = """
import ctypes, json, os, signal, socket, subprocess, sys, time
channel = socket.socket(fileno=int(sys.argv[1]))
def say(text): channel.sendall(text.encode() + b"\\n")
def step(line): say(json.dumps({"step": {"line": line}}))
"""


class Watched:
    """A job, done by a program, and what came of it."""

    def __init__(self, program, seconds=60.0, job=JOB, keep_open=(), **environment):
        self.steps, self.printed = [], b""
        self.program = program
        self.job = job
        self.limits = Limits(seconds, environment, keep_open)

    def run(self):
        command = (sys.executable, "-S", "-c", BEGIN + self.program)
        with Interrupts() as interrupts:
            return supervised(
                self.job, self.steps.append, self._print, interrupts, self.limits, command
            )

    def _print(self, data):
        self.printed += data


def begins(line, planned=0.0):
    return step_to_json(Step(line, planned))


def saying(*messages):
    return "".join(f"say({message!r})\n" for message in messages)


ENDED = saying(ending_to_json(Ending(DONE, text="all is well", report={"ok": True})))


def test_steps_and_the_ending_arrive_and_what_is_printed_is_passed_on():
    watched = Watched(
        saying(begins("loading"), begins("writing"))
        + "print('printed', flush=True); print('told', file=sys.stderr)\n"
        + ENDED
    )
    ending = watched.run()
    assert ending == Ending(DONE, text="all is well", report={"ok": True})
    assert watched.steps == ["loading", "writing"]
    assert watched.printed == b"printed\ntold\n"


def test_the_job_arrives_however_long_it_is():
    job = Job("in", "out", "folder", {"signatures": ["name" * 50_000], "mode": "fold"})
    program = "text = sys.stdin.read()\nimport hashlib\n" + (
        "step(hashlib.sha256(text.encode()).hexdigest())\n" + ENDED
    )
    watched = Watched(program, job=job)
    watched.run()
    import hashlib

    assert watched.steps == [hashlib.sha256(job.to_json().encode()).hexdigest()]
    assert Job.from_json(job.to_json()) == job


def test_a_report_larger_than_any_buffer():
    text = "x" * 3_000_000
    program = f"say(json.dumps({{'ending': {{'how': 'done', 'text': 'x' * {len(text)}}}}}))\n"
    assert Watched(program).run().text == text


def test_how_it_ended_is_told_apart():
    ending = Ending(DIFFERENT, "they differ", "a table", {"ok": False})
    assert Watched(saying(ending_to_json(ending))).run() == ending


def test_an_unexpected_error_says_in_which_step_and_what_to_report():
    ending = Ending(UNEXPECTED, "AttributeError: no such thing (reader.py:12)")
    watched = Watched(saying(begins("planning"), ending_to_json(ending)))
    message = watched.run().message
    assert message.startswith("an unexpected error while planning: AttributeError: no such thing")
    assert "nothing was written" in message
    assert "report this line" in message
    assert "\n" not in message


def test_want_of_memory_says_in_which_step_and_what_to_do():
    watched = Watched(saying(begins("planning"), ending_to_json(Ending(NO_MEMORY))))
    assert "not enough memory while planning; nothing was written" in watched.run().message
    assert "a machine with more" in watched.run().message


CRASHES = {
    "segmentation fault": "os.kill(os.getpid(), signal.SIGSEGV)",
    "lack of memory": "os.kill(os.getpid(), signal.SIGKILL)",
    "gave up": "os.abort()",
    "signal 15": "os.kill(os.getpid(), signal.SIGTERM)",
    "signal 40": "os.kill(os.getpid(), 40)",
    r"exit code 7": "sys.exit(7)",
    r"exit code 0": "",
    r"\(Check failed: a == b\)": (
        "print('2025-01-01 00:00:00.1: F tensorflow/core/x.cc:99] Check failed: a == b',"
        " flush=True); os.abort()"
    ),
    r"\(std::bad_alloc\)": (
        "print('terminate called\\n  what():  std::bad_alloc', flush=True); os.abort()"
    ),
    "without a result": "say('no message at all'); time.sleep(60)",
    "without a result ": 'say(\'{"ending": {"unknown": 1}}\'); time.sleep(60)',
    "without a result  ": "say('[1]'); time.sleep(60)",
}


@pytest.mark.parametrize("said", CRASHES)
def test_a_crash_is_one_line_with_the_step(said):
    with pytest.raises(RewriteError, match=said.strip()) as caught:
        Watched(saying(begins("running the original")) + CRASHES[said]).run()
    assert "while running the original; nothing was written" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_crash_before_the_first_step_names_the_file():
    with pytest.raises(RewriteError, match="while opening in; nothing was written"):
        Watched("os.abort()").run()


def test_a_command_that_is_not_there_is_an_error_of_ours():
    with Interrupts() as interrupts, pytest.raises(RewriteError, match="no process can be started"):
        supervised(JOB, print, print, interrupts, Limits(1.0, {}), ("/no/such/program",))


HANGING = {
    "asleep": "time.sleep(600)",
    "busy": "while True: pass",
    "deaf": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 30)); time.sleep(600)",
    "printing": "while True: print('again', flush=True)",
    "mute": "channel.close(); os.close(1); os.close(2); time.sleep(600)",
}


@pytest.mark.parametrize("how", HANGING)
def test_a_step_that_takes_too_long_is_ended(how):
    watched = Watched(saying(begins("verifying")) + HANGING[how], seconds=1.0)
    with pytest.raises(RewriteError, match=r"verifying took more than 1 seconds.*--timeout"):
        watched.run()


def test_each_step_has_the_time_for_itself():
    steps = "".join(f"{saying(begins(str(i)))}time.sleep(0.6)\n" for i in range(6))
    assert Watched(steps + ENDED, seconds=3.0).run().how == DONE


def test_a_step_that_means_to_take_a_while_may():
    program = saying(begins("measuring", 60.0)) + "time.sleep(2.0)\n" + ENDED
    assert Watched(program, seconds=1.5).run().how == DONE


def gone(pid):
    """Whether a process is no more, or soon."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.01)
    return False


GRANDCHILD = """
inner = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
step(str(inner.pid))
"""


@pytest.mark.parametrize("ends", [ENDED, "os.abort()", "time.sleep(600)"])
def test_processes_that_it_has_started_are_ended_too(ends):
    watched = Watched(GRANDCHILD + ends, seconds=2.0)
    if ends is ENDED:
        assert watched.run().how == DONE
    else:
        with pytest.raises(RewriteError):
            watched.run()
    assert gone(int(watched.steps[0]))


def test_a_file_that_another_process_keeps_open_is_not_waited_for():
    """A process that has left the group holds the pipes; the job has ended all the same."""
    watched = Watched(
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(30)'],"
        " start_new_session=True, pass_fds=[channel.fileno()])\nos.abort()",
        seconds=60.0,
    )
    start = time.monotonic()
    with pytest.raises(RewriteError, match="gave up"):
        watched.run()
    assert time.monotonic() - start < 29


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_work_at_once(number):
    watched = Watched(
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 30))\n"
        + saying(begins("running"))
        + "time.sleep(600)"
    )

    def send(_):
        watched.steps.append(True)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

    # Where the suite runs under nohup, SIGHUP is ignored, and would stay so.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with Interrupts() as interrupts, pytest.raises(Interrupted) as caught:
            supervised(
                JOB, send, print, interrupts, watched.limits,
                (sys.executable, "-S", "-c", BEGIN + watched.program),
            )  # fmt: skip
    finally:
        signal.signal(number, before)
    assert caught.value.exit_code == 128 + number
    assert watched.steps == [True]


def test_signals_are_noted_and_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupts.check()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted) as caught:
                interrupts.check()
        assert caught.value.number == signal.SIGTERM  # the first
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_said_of_a_signal():
    assert Interrupted(signal.SIGINT).said("nothing was written") == (
        "interrupted: nothing was written"
    )
    assert Interrupted(signal.SIGTERM).said("out was written") == (
        "interrupted by SIGTERM: out was written"
    )


def test_the_environment_and_open_files_are_given_on(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        watched = Watched(
            f"os.fstat({file.fileno()}); step(os.environ['TMPDIR'])\n" + ENDED,
            keep_open=[file.fileno()],
            TMPDIR="elsewhere",
        )
        assert watched.run().how == DONE
    assert watched.steps == ["elsewhere"]


def test_the_worker_ends_with_the_tool():
    """Its socket tells it, and on Linux the kernel, even where native code does not listen."""
    import subprocess

    from mbn_rewrite.cli.supervisor import WORKER

    program = (
        "import os, subprocess, sys, socket\n"
        "ours, theirs = socket.socketpair()\n"
        "read, write = os.pipe()\n"  # a job that never comes
        f"worker = subprocess.Popen([*{WORKER!r}, str(theirs.fileno())], stdin=read,\n"
        "                          pass_fds=[theirs.fileno(), write], start_new_session=True)\n"
        "print(worker.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    tool = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(tool.stdout.readline())
    assert not gone_now(pid)
    tool.kill()
    tool.wait()
    tool.stdin.close()
    tool.stdout.close()
    assert gone(pid)


def gone_now(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
