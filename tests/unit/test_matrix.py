"""`tools/matrix.py`: what it would run, and what it says of how that went."""

import configparser
import sys

import pytest
from absl import flags

from tools import matrix


@pytest.fixture(autouse=True)
def _flags():
    flags.FLAGS(["matrix"])
    yield
    for flag in flags.FLAGS.get_flags_for_module(matrix.__name__):
        flag.unparse()


def test_the_oldest_are_what_the_package_asks_for():
    setup = configparser.ConfigParser()
    setup.read(matrix.ROOT / "setup.cfg")
    asked = setup["options"]["install_requires"].split()
    for requirement in matrix.OLDEST:
        package, _, version = requirement.removesuffix(".*").partition("==")
        assert f"{package}>={version}" in asked
    oldest = min((one.python for one in matrix.COMBINATIONS), key=lambda v: int(v.split(".")[1]))
    assert setup["options"]["python_requires"] == f">={oldest}"
    for one in matrix.COMBINATIONS:
        said = f"Programming Language :: Python :: {one.python}"
        assert said in setup["metadata"]["classifiers"].splitlines()


def test_pythons_are_found_and_those_of_other_versions_are_not(tmp_path, monkeypatch):
    here = ".".join(map(str, sys.version_info[:2]))
    commands, versions = tmp_path / "commands", tmp_path / "pyenv" / "versions"
    (versions / f"{here}.1" / "bin").mkdir(parents=True)
    commands.mkdir()
    switched_off = commands / f"python{here}"
    switched_off.write_text("#!/bin/sh\nexit 127\n")
    switched_off.chmod(0o755)
    (commands / "python3.9").symlink_to(sys.executable)
    kept = versions / f"{here}.1" / "bin" / "python"
    kept.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert list(matrix.pythons(here)) == [kept]
    assert list(matrix.pythons("3.9")) == []


FINE = matrix.Outcome("9 passed", versions=("2.16.2", "2.16.0", "3.8.0", "1.26.4"))
BAD = matrix.Outcome("1 failed, 8 passed", failed=True)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([FINE, FINE, FINE], 0),
        ([FINE, matrix.NO_PYTHON, FINE], 0),
        ([FINE, BAD, FINE], 1),
        ([matrix.NO_PYTHON] * 3, 1),
    ],
)
def test_the_exit_code(outcomes, code, monkeypatch, capsys):
    left = iter(outcomes)
    monkeypatch.setattr(matrix, "outcome_of", lambda one, tests: next(left))
    assert matrix.main(["matrix"]) == code
    printed = capsys.readouterr().out
    assert all(outcome.said in printed for outcome in outcomes)


def test_one_of_them_alone(monkeypatch, capsys):
    flags.FLAGS(["matrix", "--only=newest-3.13", "tests/unit/test_planner.py"])
    asked = []
    monkeypatch.setattr(matrix, "outcome_of", lambda *given: asked.append(given) or FINE)
    assert matrix.main(["matrix", "tests/unit/test_planner.py"]) == 0
    ((one, tests),) = asked
    assert (one.name, tests) == ("newest-3.13", ["tests/unit/test_planner.py"])
    assert "newest-3.13" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 3])
def test_what_is_run_is_logged_and_its_last_line_said(code, tmp_path):
    program = f"import sys; print('much'); print('== 9 passed =='); print(); sys.exit({code})"
    log = tmp_path / "log"
    assert matrix.run([sys.executable, "-c", program], log) == (code, "9 passed")
    assert log.read_text() == "much\n== 9 passed ==\n\n"


def test_what_cannot_be_installed_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "PLACE", tmp_path)
    monkeypatch.setattr(matrix, "pythons", lambda version: iter([tmp_path / "no_python"]))
    monkeypatch.setattr(matrix, "run", lambda command, log: (1, "no such thing"))
    outcome = matrix.outcome_of(matrix.COMBINATIONS[0], [])
    assert outcome.failed
    assert outcome.said == "cannot be installed"
    assert str(tmp_path / "oldest-3.10.install.log") in capsys.readouterr().out
