"""Folders of runs: made, locked, found after a kill; and outputs that appear whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mbn_rewrite import output_dir
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.output_dir import OwnFolder, clean_up, put_in_place, working_folder

MARK = ".mbn_rewrite"


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path_factory, monkeypatch):
    """The folders of other runs on this machine are no business of these tests."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))


def model(path, content="new"):
    path.mkdir(parents=True)
    (path / "saved_model.pb").write_text(content)
    (path / "variables").mkdir()
    return path


def content_of(path):
    return (path / "saved_model.pb").read_text()


def killed(directory, statements, *arguments):
    """Runs statements in a process that is killed after them."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from mbn_rewrite import output_dir\n"
        "from mbn_rewrite.output_dir import *\n"
        f"directory = Path({str(directory)!r})\n"
        f"{statements}\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_folder_is_marked_locked_and_gone_at_the_end(tmp_path):
    folder = OwnFolder(tmp_path, tmp_path / "served")
    assert folder.path.parent == tmp_path
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert json.loads((folder.path / MARK).read_text())["destination"] == "served"
    clean_up(tmp_path)
    assert folder.path.is_dir()
    (folder.path / "part").mkdir()
    folder.remove()
    folder.remove()
    assert names(tmp_path) == []


def test_a_folder_is_gone_with_its_object(tmp_path):
    folder = OwnFolder(tmp_path)
    assert len(names(tmp_path)) == 1
    del folder
    assert names(tmp_path) == []


def test_the_longest_name_of_an_output(tmp_path):
    destination = tmp_path / ("n" * 255)
    replaced(destination, False)
    assert names(tmp_path) == ["n" * 255]


def test_what_a_killed_run_left_is_removed(tmp_path):
    killed(
        tmp_path,
        "f = OwnFolder(directory, directory / 'out'); (f.new / 'deep').mkdir(parents=True)",
    )
    assert len(names(tmp_path)) == 1
    assert clean_up(tmp_path) == []
    assert names(tmp_path) == []


def test_temporary_folders_of_killed_runs_are_removed_by_any_run(tmp_path):
    import tempfile

    temporary = Path(tempfile.gettempdir())
    killed(temporary, "f = OwnFolder(directory)")
    (temporary / "theirs").mkdir()
    assert len(names(temporary)) == 2
    clean_up()
    assert names(temporary) == ["theirs"]


def test_a_folder_that_another_process_uses_is_left_alone(tmp_path):
    """Where the tool is killed, its worker may go on for a moment: it has the lock too."""
    folder = OwnFolder(tmp_path)
    user = subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[folder.fileno()]
    )
    folder._remove.detach()
    os.close(folder.fileno())
    clean_up(tmp_path)
    assert folder.path.is_dir()
    user.communicate(b"\n")
    clean_up(tmp_path)
    assert not folder.path.exists()


def test_a_run_killed_between_any_two_steps_of_making_a_folder(tmp_path):
    (tmp_path / ".out.mbn_rewrite.0123456789abcdeb").mkdir()  # not yet marked
    (tmp_path / ".out.mbn_rewrite.0123456789abcdec").mkdir()
    (tmp_path / ".out.mbn_rewrite.0123456789abcdec" / MARK).touch()  # marked, not yet written
    clean_up(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_that_is_taken_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """Another run cleans up after each step of making one: the first two are lost, and no more."""
    opened, locked, lost = os.open, output_dir._locked, []

    def other_run():
        if len(lost) < 2:
            monkeypatch.setattr(os, "open", opened)
            monkeypatch.setattr(output_dir, "_locked", locked)
            clean_up(tmp_path)
            lost.append(True)

    def before_opening(*arguments):
        other_run()
        return opened(*arguments)

    def before_locking(lock):
        other_run()
        return locked(lock)

    monkeypatch.setattr(os, "open", before_opening)
    folder = OwnFolder(tmp_path)
    monkeypatch.setattr(output_dir, "_locked", before_locking)
    second = OwnFolder(tmp_path)
    assert len(lost) == 2
    assert names(tmp_path) == sorted([folder.path.name, second.path.name])
    clean_up(tmp_path)
    assert folder.path.is_dir()
    assert second.path.is_dir()


def foreign(path, mark=None, **files):
    path.mkdir()
    if mark is not None:
        (path / MARK).write_text(mark)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


OURS = json.dumps({"folder_of": "mbn_rewrite", "machine": os.uname().nodename})


@pytest.mark.parametrize(
    ("name", "mark", "files"),
    [
        ("mbn_rewrite.0123456789abcdeb", None, {"notes": "precious"}),
        ("mbn_rewrite.0123456789abcdeb", "", {"notes": "precious"}),
        ("mbn_rewrite.0123456789abcdeb", "no JSON", {"notes": "precious"}),
        ("mbn_rewrite.0123456789abcdeb", "[1]", {"notes": "precious"}),
        ("mbn_rewrite.0123456789abcdeb", '{"folder_of": "others"}', {}),
        ("mbn_rewrite.mine", OURS, {}),
        ("mbn_rewrite", OURS, {}),
        ("out.mbn_rewrite.0123456789abcdeb", OURS, {}),
        (".out.mbn_rewrite.0123456789abcdeb.kept", OURS, {}),
        (".out.1a2b3c4d", None, {"saved_model.pb": "from another program"}),
    ],
)
def test_what_is_not_provably_ours_is_left_alone(name, mark, files, tmp_path):
    path = foreign(tmp_path / name, mark, **files)
    before = names(path)
    clean_up(tmp_path)
    assert names(path) == before


def test_a_link_is_not_followed(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    target = foreign(tmp_path / "mine", OURS, notes="precious")
    (place / "mbn_rewrite.0123456789abcdeb").symlink_to(target)
    other = foreign(place / "mbn_rewrite.0123456789abcdec", notes="precious")
    (other / MARK).symlink_to(target / MARK)
    clean_up(place)
    assert (target / "notes").exists()
    assert (other / "notes").exists()


def test_links_inside_are_removed_and_what_they_lead_to_is_kept(tmp_path):
    target = foreign(tmp_path / "mine", notes="precious")
    folder = OwnFolder(tmp_path)
    (folder.path / "variables").symlink_to(target)
    folder.remove()
    assert names(tmp_path) == ["mine"]
    assert (target / "notes").exists()


def test_a_folder_of_another_machine_is_left_for_a_day(tmp_path):
    """Where a file system is shared, its lock may not be seen here."""
    mark = json.dumps({"folder_of": "mbn_rewrite", "machine": "another"})
    path = foreign(tmp_path / "mbn_rewrite.0123456789abcdeb", mark)
    clean_up(tmp_path)
    assert path.is_dir()
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(path / MARK, (long_ago, long_ago))
    clean_up(tmp_path)
    assert not path.exists()


def test_places_that_cannot_be_seen_are_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert clean_up(tmp_path / "nowhere", tmp_path / "file", Path("/proc/1/fd/none")) == []


# ------------------------------------------------------------------------ the last step


def replaced(out, overwrite, meanwhile=lambda: None):
    """Writes a model to a working folder, and makes it the output."""
    with working_folder(out) as folder:
        model(folder.new)
        meanwhile()
        put_in_place(folder, out, overwrite)


@pytest.fixture(params=["in one step", "in two"])
def exchange(request, monkeypatch):
    if request.param == "in two":
        monkeypatch.setattr(output_dir, "renamed", lambda *_: False)
    return request.param


def test_an_output_appears_with_the_usual_permissions(exchange, tmp_path):
    mask = os.umask(0o027)
    try:
        with working_folder(tmp_path / "out") as folder:
            model(folder.new).chmod(0o700)
            assert not (tmp_path / "out").exists()
            put_in_place(folder, tmp_path / "out", overwrite=False)
    finally:
        os.umask(mask)
    assert content_of(tmp_path / "out") == "new"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == ["out"]


def test_an_output_is_replaced(exchange, tmp_path):
    out = model(tmp_path / "out", "old")
    replaced(out, True)
    assert content_of(out) == "new"
    assert names(tmp_path) == ["out"]


def test_overwriting_what_is_not_there(exchange, tmp_path):
    replaced(tmp_path / "out", True)
    assert content_of(tmp_path / "out") == "new"


def test_what_came_meanwhile_is_not_replaced(exchange, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RewriteError, match="exists"):
        replaced(out, False, lambda: model(out, "theirs"))
    assert content_of(out) == "theirs"
    out_2 = model(tmp_path / "out2", "old")
    with pytest.raises(RewriteError, match="holds more"):
        replaced(out_2, True, (out_2 / "notes.txt").touch)
    assert content_of(out_2) == "old"
    assert names(tmp_path) == ["out", "out2"]


def test_what_comes_in_the_very_last_moment_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir, "_check_replaced", lambda *_: None)
    out = model(tmp_path / "out", "theirs")
    with pytest.raises(RewriteError, match="cannot be written"):
        replaced(out, False)
    assert content_of(out) == "theirs"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real = model(tmp_path / "elsewhere" / "v1", "old")
    (tmp_path / "out").symlink_to(real)
    replaced(tmp_path / "out", True)
    assert (tmp_path / "out").is_symlink()
    assert content_of(real) == "new"
    assert names(real.parent) == ["v1"]


def test_a_second_step_that_fails_brings_back_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir, "renamed", lambda *_: False)
    out = model(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(5, "the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RewriteError, match="the disk is gone"):
        replaced(out, True)
    assert content_of(out) == "old"
    assert names(tmp_path) == ["out"]


KILLED_BETWEEN = """
output_dir.renamed = lambda *_: False
out, rename = directory / "out", Path.rename
def until_the_second(self, target):
    if self.name == "new":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(self, target)
Path.rename = until_the_second
with working_folder(out) as folder:
    folder.new.mkdir()
    (folder.new / "saved_model.pb").write_text("new")
    put_in_place(folder, out, overwrite=True)
"""


def test_a_run_killed_between_two_steps_has_its_output_put_back(tmp_path):
    out = model(tmp_path / "out", "old")
    killed(tmp_path, KILLED_BETWEEN)
    assert not out.exists()
    assert clean_up(tmp_path) == [out]
    assert content_of(out) == "old"
    assert names(tmp_path) == ["out"]


def test_what_was_moved_aside_does_not_replace_what_came_since(tmp_path):
    out = model(tmp_path / "out", "old")
    killed(tmp_path, KILLED_BETWEEN)
    model(out, "newer")
    assert clean_up(tmp_path) == []
    assert content_of(out) == "newer"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["../out", "/out", "", ".", 3])
def test_an_output_is_put_back_beside_its_folder_only(name, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    mark = json.loads(OURS) | {"destination": name}
    path = foreign(place / ".out.mbn_rewrite.0123456789abcdeb", json.dumps(mark))
    model(path / "old")
    clean_up(place)
    assert names(tmp_path) == ["place"]
    assert names(place) == []


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    with pytest.raises(RewriteError, match="is not writable"), working_folder(Path("/proc/out")):
        pass


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RewriteError, match="No space left"), working_folder(tmp_path / "out"):
        pass
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_no_place_for_temporary_files_is_said(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(RewriteError, match="TMPDIR"), output_dir.temporary_folder():
        pass
