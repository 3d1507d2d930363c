"""The hash of a stage's code: what it depends on, and what it does not."""

import shutil

import grimp
import pytest

from stages.runtime import code_hash
from stages.runtime.code_hash import hash_code, import_closure, normalise, stage_files
from tests.records import STAGES

FOLDER = code_hash.STAGES.parent
SOURCE = '''
"""Module."""
NAME = "weights"
"""Of a file."""


def function(x, errors):
    """Do something."""
    found = f"{x} is {'odd' if x % 2 else 'even'}"
    key = "length"
    if errors[key] == "none":
        raise InputError(f"{found}; correct {errors['which']}")  # reason
    for index in track(range(3), f"step of {x}", 3):
        pass
    text = "result"
    text += " written"
    click.echo(text)
    raise kind("; ".join(str(it) for it in x) + " at the end")
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Module."""', '"""Another docstring."""'),
        ('"""Of a file."""', '"""Name of a file."""'),
        ("Do something", "Do it"),
        ("# reason", "# another reason"),
        (" is {", " was {"),
        ("'odd'", "'uneven'"),
        ("{errors['which']}", "{errors['which']} now"),
        ("step of", "step"),
        ('"result"', '"outcome"'),
        (" written", " saved"),
        ('"; "', '", "'),
        ("at the end", "in the end"),
        ("range(3)", "range( 3 )"),
    ],
)
def test_prose_does_not_count(old, new):
    """Docstrings, comments, spaces and the text of messages leave the normalised source as it is."""
    assert old in SOURCE
    assert normalise(SOURCE.replace(old, new)) == normalise(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"weights"', '"weight"'),
        ("% 2", "% 3"),
        ('"length"', '"width"'),
        ('== "none"', '== "null"'),
        ("range(3)", "range(4)"),
        ("raise InputError", "raise UnavailableError"),
        ("errors[key]", "errors[x]"),
    ],
)
def test_code_counts(old, new):
    """Operators, numbers, names and strings that are compared or looked up change the normalised source."""
    assert old in SOURCE
    assert normalise(SOURCE.replace(old, new)) != normalise(SOURCE)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of stages/, the hashes of its stages, and what puts it in place of the project's."""
    folder = tmp_path_factory.mktemp("code") / "stages"
    shutil.copytree(FOLDER / "stages", folder, ignore=shutil.ignore_patterns("__pycache__"))
    cached = ("_hash_file", "_imported_modules")
    copied = {name: once_per_content(getattr(code_hash, name).__wrapped__) for name in cached} | {"STAGES": folder}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in copied.items():
            patch.setattr(code_hash, name, value)
        return folder, {stage: hash_code(stage) for stage in STAGES}, copied


def once_per_content(function):
    """Compute a function of a file once for each content that the file has."""
    found = {}

    def look_up(path):
        key = path, path.read_bytes()
        if key not in found:
            found[key] = function(path)
        return found[key]

    return look_up


@pytest.fixture
def edit(tree, monkeypatch):
    """Replace text in one file of the copy until the test ends; returns the hashes of the stages after it."""
    folder, _, copied = tree
    for name, value in copied.items():
        monkeypatch.setattr(code_hash, name, value)
    before = {}

    def replace(name, old, new):
        path = folder / name
        before[path] = path.read_text()
        assert old in before[path]
        path.write_text(before[path].replace(old, new))
        return {stage: hash_code(stage) for stage in STAGES}

    yield replace
    for path, text in before.items():
        path.write_text(text)


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("runtime/schema.py", '"""A block of params.yaml."""', '"""Other words."""', ()),
        ("prune/surgery.py", "import torch", "import torch as pytorch", ("prune", "rounds")),
        ("fetch/params.py", "ge=0", "ge=1", ("fetch",)),
        ("models/pruned_unet.py", "UNets of any widths", "UNets", ("prune", "finetune")),
        ("report/page.html.j2", "</main>", "</main> ", ("report",)),
        ("runtime/seeds.py", '"/"', '"."', ("reference", "finetune")),
    ],
)
def test_a_change_reaches_the_stages_that_run_it(tree, edit, file, old, new, changed):
    """A stage's hash moves with its own closure, with files that are copied as they are, and with templates."""
    _, before, _ = tree
    after = edit(file, old, new)
    moved = {stage for stage in STAGES if after[stage] != before[stage]}
    shared = file.split("/")[0] not in STAGES
    assert moved >= set(changed) if changed and shared else moved == set(changed)


@pytest.fixture(scope="module")
def graph():
    """The imports as grimp finds them, without those for type checkers."""
    return grimp.build_graph("stages", exclude_type_checking_imports=True, cache_dir=None)


@pytest.mark.parametrize("command", [*STAGES, "register", "tools", "tracking"])
def test_the_closure_is_what_grimp_finds(graph, command):
    """An independent program reads the same imports; only those for type checkers are left out."""
    main = f"stages.{command}.__main__"
    modules = {main, *graph.find_upstream_modules(main)}

    assert {module for module in import_closure(main) if not (FOLDER / module.replace(".", "/")).is_dir()} == {
        module for module in modules if not (FOLDER / module.replace(".", "/")).is_dir()
    }


def test_imports_inside_functions_count():
    """The stages' mains import what is heavy late."""
    assert "stages.prune.surgery" in import_closure("stages.prune.__main__")


def test_a_stage_runs_no_other_stages_code():
    """So that a change in one stage makes only it and what follows stale; rounds and variants run that of others."""
    runs = {"rounds": {"importance", "prune", "finetune"}, "variants": {"evaluate"}}
    for stage in STAGES:
        others = [f"{other}/" for other in STAGES if other not in {stage, *runs.get(stage, ())}]
        assert not [file for file in stage_files(stage) if file.startswith(tuple(others))]
