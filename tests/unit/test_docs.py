"""The documentation says what is so: its code runs, its commands and its pictures are right.

A fenced block of Python runs, unless a comment before it says otherwise:

    <!-- not run: it needs a GPU -->
    <!-- excerpt: mbn_rewrite/ir/graph.py -->     it stands in that file, line by line

The blocks of a page share one namespace, which `_given` begins, in a folder with a model.keras
and a saved_model. Shell commands are not run; without such a comment, their flags, files and
targets must exist.
"""

import ast
import copy
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest

import mbn_rewrite as mbn
from mbn_rewrite.cli.flags import FLAGS
from mbn_rewrite.cli.subcommands import command_of
from mbn_rewrite.ir.graph import Input
from mbn_rewrite.rules.relations import RELATIONS
from tools import pictures

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("mbn-rewrite", "python -m mbn_rewrite", "python tools/rewrite_savedmodel.py")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: the word after the fence.
        code: what is in it, without the indentation of the fence.
        mark, of: a mark of the comment before it, such as "excerpt", and what follows the colon.
        line: the line of the page that the code begins at, counted from 0.
    """

    language: str
    code: str
    mark: str
    of: str
    line: int


_FENCED = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|excerpt): (?P<of>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(text):
    for found in _FENCED.finditer(text):
        indent = len(found["indent"])
        code = "".join(line[indent:] or "\n" for line in found["code"].splitlines(keepends=True))
        line = text.count("\n", 0, found.start("code"))
        yield Block(found["language"], code, found["mark"] or "", found["of"] or "", line)


def name_of(page):
    return str(page.relative_to(ROOT))


def pages_with(language, mark=""):
    return [
        page
        for page in PAGES
        if any((b.language, b.mark) == (language, mark) for b in blocks_of(page.read_text()))
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a small model, as file of Keras and as SavedModel."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )
    folder = tmp_path_factory.mktemp("docs")
    model.save(folder / "model.keras")
    model.export(folder / "saved_model", verbose=False)
    return folder


@pytest.fixture
def given(files, tmp_path, monkeypatch):
    """The names that a page's code begins with, in a folder with the models."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    model = keras.models.load_model("model.keras")
    inputs = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    targets = np.zeros((16, 2), "float32")
    return {"mbn": mbn, "model": model, "real_data": inputs, "inputs": inputs, "targets": targets}


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_code_runs(page, given):
    for block in blocks_of(page.read_text()):
        if block.language == "python" and not block.mark:
            code = ast.parse(block.code)
            ast.increment_lineno(code, block.line)  # so that errors name the line of the page
            exec(compile(code, page, "exec"), given)


@pytest.mark.parametrize(
    "page",
    sorted({*pages_with("python", "excerpt"), *pages_with("sh", "excerpt")}),
    ids=name_of,
)
def test_excerpts_stand_in_their_files(page):
    for block in blocks_of(page.read_text()):
        if block.mark == "excerpt":
            assert block.code.rstrip() in (ROOT / block.of).read_text(), f"not in {block.of}"


# ------------------------------------------------------------------------ shell commands


def commands_in(page):
    """The commands of a page's shell blocks, without comments, lines joined."""
    for block in blocks_of(page.read_text()):
        if block.language == "sh" and not block.mark:
            for line in block.code.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


COMMANDS = {
    f"{name_of(page)}: {' '.join(words)}": words for page in PAGES for words in commands_in(page)
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    words = list(COMMANDS[command])
    while re.match(r"[A-Z_]+=", words[0]):  # a variable of the environment
        del words[0]
    line = " ".join(words).removeprefix(".venv/bin/")
    program = next((program for program in PROGRAMS if line.startswith(f"{program} ")), None)
    if program:
        parsed = copy.deepcopy(FLAGS)([program, *shlex.split(line.removeprefix(program))])
        command, paths = command_of(parsed[1:])
        assert len(paths) == 2 or (len(paths) == 1 and command != "verify"), "IN and OUT"
    elif line.startswith("make "):
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif line.startswith("python "):
        flags = {word.partition("=")[0].removeprefix("--") for word in words if word[:2] == "--"}
        assert flags <= flags_defined_in(source_of(line.split()[1:]))
    else:
        assert line.startswith("pip install "), "a kind of command that this test knows"


def source_of(words):
    """The files that define what a program takes."""
    if words[0] == "-m":
        return (ROOT / words[1]).glob("*.py")
    return [ROOT / words[0]]


def flags_defined_in(files):
    """The flags that programs define, by `flags.DEFINE_...` or `add_argument`."""
    pattern = r"(?:DEFINE_\w+|add_argument)\(\s*\"(?:--)?(\w+)\""
    return {name for file in files for name in re.findall(pattern, file.read_text())}


def test_usage_names_every_flag():
    (usage,) = (
        block.code
        for block in blocks_of((ROOT / "docs/guide/command_line.md").read_text())
        if block.code.startswith("mbn-rewrite [--")
    )
    named = {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", usage)}
    ours = {flag.name for flag in FLAGS.get_flags_for_module("mbn_rewrite.cli.flags")}
    named = {name.removeprefix("no") for name in named}
    assert named == ours - {"help", "h", "version"}


# ------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("page", ["docs/design.md", "docs/guide/modes.md", "docs/guide/moves.md"])
def test_pictures_are_as_the_code_draws_them(page):
    text = (ROOT / page).read_text()
    assert "<!-- picture: " in text
    assert pictures.drawn(text) == text, "draw them anew: python tools/pictures.py"


def test_table_of_rules_has_every_kind_of_operation():
    assert {type(op) for op, _ in pictures.PROBES.values()} == set(RELATIONS) - {Input}


# ----------------------------------------------------------------------- links and names


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_that_are_named_exist(page):
    rooms = "mbn_rewrite|tests|benchmarks|study|tools|docs"
    named = re.findall(rf"`((?:{rooms})/[\w./-]+)", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


def test_reference_has_every_public_name():
    reference = (ROOT / "docs/reference.md").read_text()
    assert not [name for name in mbn.__all__ if f"::: mbn_rewrite.{name}\n" not in reference]


def test_rooms_of_contributing_are_those_that_there_are():
    (tree,) = (
        block.code
        for block in blocks_of((ROOT / "CONTRIBUTING.md").read_text())
        if block.code.startswith("mbn_rewrite/\n")
    )
    named = set(re.findall(r"\w+(?:/|\.py)", tree.partition("\ntools/")[0])) - {"mbn_rewrite/"}
    there = {path: path.name + "/" * path.is_dir() for path in (ROOT / "mbn_rewrite").rglob("*")}
    assert not named - set(there.values())
    rooms = {name for path, name in there.items() if path.parent.name == "mbn_rewrite"}
    assert not {name for name in rooms if re.match(r"[a-z]\w*[/.](py)?$", name)} - named


def test_citation_is_of_this_version():
    assert f"\nversion: {mbn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_linter_is_of_one_version():
    files = [ROOT / "setup.cfg", ROOT / ".pre-commit-config.yaml"]
    pins = [re.findall(r"\bruff==[\d.]+", file.read_text()) for file in files]
    assert all(pins)
    assert len({pin for found in pins for pin in found}) == 1


# ------------------------------------------------------------------ these tests can fail


def test_blocks_are_found_with_their_marks():
    marked = "    <!-- not run: it needs a GPU -->\n    ```python\n    x = 1\n\n    y\n    ```\n"
    (block,) = blocks_of(f"1. a\n\n{marked}")
    assert block == Block("python", "x = 1\n\ny\n", "not run", "it needs a GPU", 4)


def test_flags_that_a_program_lacks_are_noticed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text('flags.DEFINE_bool(\n    "json", None)\nparser.add_argument("--models")\n')
    assert flags_defined_in([program]) == {"json", "models"}
