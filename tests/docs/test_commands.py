"""Every command, key and name that a page shows exists: parsed, not run."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import click
import pytest
from ruamel.yaml import YAML

from flows.__main__ import main
from flows.workspaces.method_rows import check_plan, parse_seeds, plan_rows
from flows.workspaces.overrides import apply, parse_grid, parse_limits, parse_overrides
from flows.workspaces.recipe_rows import parse_recipes, parse_steps, plan_rows_of_curve
from stages.params import Params, load_params
from stages.register.policy import Policy, load_policy
from stages.runtime.bounded import parse_yaml
from stages.tools.comparison.published import METHODS
from tests.markdown import ROOT, blocks, commands, inline_commands, pages

PAGES = pages()
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SHELL = {
    *(
        "apt-get",
        "buildah",
        "cat",
        "cd",
        "chmod",
        "cp",
        "curl",
        "docker",
        "echo",
        "export",
        "gh",
        "git",
        "hf",
        "ls",
        "mkdir",
    ),
    *("nvidia-smi", "open", "openssl", "pg_dump", "pip", "pre-commit", "read", "rm", "set", "sh", "source", "tar"),
    *("umask", ".", "kill", "aws", "ssh", "tmux"),
}
"""Programs of others, whose options are theirs."""
OWN = ("stages", "benchmarks", "recipes")
PLACEHOLDER = re.compile(r"[A-Z]+|…|<.*>")
SHA = "a" * 64


def parse(words: list[str], *, is_whole: bool = True) -> None:
    """Check a command: it exists, takes these options and allows their values.

    Args:
        words: The command.
        is_whole: Whether arguments that it demands have to be there.

    Raises:
        AssertionError, click.ClickException: It would be refused.
    """
    program, *arguments = words
    if program == "espalier":
        _parse_click(main, arguments, is_whole=is_whole)
    elif program == "make":
        wrong = [word for word in arguments if "=" not in word and word not in TARGETS]
        assert not wrong, f"the Makefile has no target {wrong}"
    elif program == "python" and arguments[0] == "-m":
        _parse_module(arguments[1], arguments[2:], is_whole=is_whole)
    elif program == "dvc":
        import_module("dvc.cli").parse_args(arguments)
    elif program == "mlflow":
        _parse_click(import_module("mlflow.cli").cli, arguments, is_whole=is_whole)
    elif program == "prefect":
        import_module("prefect.cli._app")._app.parse_args(arguments, exit_on_error=False, print_error=False)
    else:
        assert program in SHELL or program.startswith(".ci/"), f"unknown program {program}"


def _parse_module(name: str, arguments: list[str], *, is_whole: bool) -> None:
    """Parse the arguments of a program of this project that is started as a module."""
    package, _, last = name.rpartition(".")
    assert package or name != "flows", "write espalier in place of python -m flows"
    if package.partition(".")[0] in OWN and not PLACEHOLDER.fullmatch(last):
        spec = find_spec(name)
        assert spec, f"there is no module {name}"
        module = import_module(f"{name}.__main__" if spec.submodule_search_locations else name)
        _parse_click(module.main, arguments, is_whole=is_whole)


def _parse_click(command: click.Command, arguments: list[str], *, is_whole: bool) -> None:
    """Parse the arguments of a command of click, and of the command below it that they name."""
    if isinstance(command, click.Group):
        if not arguments or arguments[0].startswith("-"):
            assert arguments in (["--help"], ["-h"], ["--version"]), arguments
            return
        name, *rest = arguments
        if PLACEHOLDER.fullmatch(name):
            return
        below = command.get_command(click.Context(command), name)
        assert below is not None, f"there is no command {name}"
        _parse_click(below, rest, is_whole=is_whole)
        return
    if "--help" in arguments:
        return
    try:
        with command.make_context(command.name, list(arguments)) as context:
            _check_values(context.params)
    except click.exceptions.Exit:  # an eager option, such as --keys of init, has done its work
        return
    except click.MissingParameter:
        if is_whole:
            raise


def _check_values(given: dict) -> None:
    """Check what a command of flows reads before it starts: overrides, grids, limits, and the rows of compare."""
    texts = given.get("texts") or ()
    preset = given.get("preset")
    named = preset and not PLACEHOLDER.fullmatch(preset)
    path = ROOT / "recipes" / "presets" / f"{preset}.yaml" if named else ROOT / "params.yaml"
    assert path.is_file(), f"there is no preset {preset}"
    texts = [text for text in texts if not PLACEHOLDER.fullmatch(text) and text != "KEY=VALUE"]
    apply(parse_overrides(texts), path)
    parse_limits([text for text in given.get("limits") or () if text != "STAGE=MINUTES"])
    for key, values in parse_grid([text for text in given.get("grids") or () if "=" in text]).items():
        for value in values:
            apply({**parse_overrides(texts), key: value}, path)
    if "is_curve" in given:
        _check_comparison(given, load_params(path), parse_overrides(texts))


def _check_comparison(given: dict, params: Params, overrides: dict) -> None:
    """Check rows, seeds, steps and recipes as compare does."""
    rows, seeds = given["rows"], parse_seeds(given["seeds"])
    names = None if rows is None else rows.split(",") if rows else []
    if given["is_curve"]:
        steps = parse_steps(given["steps"]) if given["steps"] else None
        recipes = parse_recipes(text for text in given["recipes"] if text != "NAME={KEY: VALUE}")
        plan_rows_of_curve(params, names, seeds, steps, recipes, overrides)
    else:
        assert given["steps"] is None, "--steps is for --curve"
        assert not given["recipes"], "--recipe is for --curve"
        check_plan(plan_rows(params), [*METHODS] if names is None else names, seeds, overrides)


def find_shell(tree: object) -> Iterator[str]:
    """Yield the scripts of a workflow for GitHub or GitLab: the values of run and the items of script."""
    if isinstance(tree, list):
        for item in tree:
            yield from find_shell(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("run", "script"):
                yield from [value] if isinstance(value, str) else value
            else:
                yield from find_shell(value)


def find_wrong(scripts: list[tuple[str, str]], *, is_whole: bool = True) -> list[str]:
    """List the commands in some scripts (place, text) that would be refused, with the reason."""
    wrong = []
    for place, script in scripts:
        for words in commands(script):
            try:
                parse(words, is_whole=is_whole)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # each program refuses in its own way
                wrong.append(f"{place}: {shlex.join(words)}: {error or type(error).__name__}")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_exists(page, monkeypatch):
    """Program, command, options and their values, in blocks and in sentences; nothing names the module flows."""
    inline = [(page, text) for text in inline_commands(page)]
    if blocks(page, "diff"):  # its patches add the values; test_how_tos.py applies them and runs the commands
        monkeypatch.setattr(sys.modules[__name__], "apply", lambda *_: None)

    assert find_wrong([(block.place, block.text) for block in blocks(page, "sh")]) == []
    assert find_wrong(inline, is_whole=False) == []


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("espalier sweeep --grid seed=1", "no command sweeep"),
        ("espalier plan --tflop 40", "No such option '--tflop'"),
        ("espalier sweep --runner ray --grid seed=1", "'ray' is not one of"),
        ("espalier compress --set prune.ratio=0.3", "prune.target.ratio"),
        ("espalier compress --set prune.target.ratio=3", "prune.target"),
        ("espalier sweep --grid importance.criterion=magnitude,tailor", "importance.criterion"),
        ("espalier compare --preset cifar11", "no preset cifar11"),
        ("espalier compare --preset digits --rows nonsense", "there is no row 'nonsense'"),
        ("espalier compare --preset digits --seeds a,b", "--seeds"),
        ("espalier compare --preset digits --steps 1,9", "--curve"),
        ("espalier compare --curve --preset digits --steps 9,1", "--steps 9,1"),
        ("espalier compare --curve --preset digits --recipe x={}", "--recipe x"),
        ("espalier draw", "Missing parameter"),
        ("python -m flows compress", "write espalier"),
        ("python -m stages.prune --modell a", "No such option"),
        ("dvc reproduce", "parser error"),
        ("make runs", "no target"),
        ("prefect worker start --poool a", "poool"),
        ("A=1 espalier plan && for x in 1 2; do espalyer plan & done", "unknown program espalyer"),
    ],
)
def test_a_wrong_command_is_found(command, reason):
    """A name, an option, a choice, a key, a value, a missing argument, a preset, a program: each is named."""
    (message,) = find_wrong([("page:1", command)])

    assert reason in message


def test_words_of_a_script_are_those_that_the_shell_runs():
    """Comments, assignments, redirections, loops and substitutions go; quoted words and long lines stay whole."""
    script = """a --set 'x={b: 1, c: [2]}' \\
  -- d   # e
N=1 f > g 2>&1 | h "i
j" & for k in 1 2; do L=$k m --n {} & done
if o; then p; fi; q "$(r s)"; t $(u v)
"""

    found = [["a", "--set", "x={b: 1, c: [2]}", "--", "d"], ["f"], ["h", "i\nj"], ["m", "--n", "{}"]]
    assert list(commands(script)) == [*found, ["o"], ["p"], ["q", "$(r s)"], ["t"], ["u", "v"]]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_params_is_allowed(page):
    """A block of YAML whose keys are those of params.yaml or of the promotion policy is valid in their place."""
    for block in blocks(page, "yaml"):
        text = block.text.replace("<commit>", "a" * 40)
        tree = parse_yaml(re.sub(r"<[^>]+>", SHA, text), block.place)
        if set(tree) <= set(Params.model_fields):
            values = {f"{part}.{key}": value for part, keys in tree.items() for key, value in keys.items()}
            apply(values, ROOT / "params.yaml")
        elif set(tree) <= set(Policy.model_fields):
            Policy.model_validate(load_policy(ROOT / "mlflow" / "promotion.yaml").model_dump() | tree)
        else:
            assert page in ("docs/ci.md", "docs/how-to/cluster.md"), f"{block.place} is neither params nor a workflow"


def test_the_commands_of_the_workflows_exist():
    """Those of docs/ci.md, for GitHub and for GitLab."""
    scripts = [
        (block.place, script)
        for block in blocks("docs/ci.md", "yaml")
        for script in find_shell(YAML(typ="safe").load(block.text))
    ]

    assert len(scripts) == 9
    assert find_wrong([(place, re.sub(r"\$\{\{.*?\}\}", "X", script)) for place, script in scripts]) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_import_of_a_page_finds_its_name(page):
    """A block of Python parses, and what it imports is there."""
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom):
                for name in node.names:
                    assert hasattr(import_module(node.module), name.name), block.place
            elif isinstance(node, ast.Import):
                for name in node.names:
                    import_module(name.name)
