"""A stage -> the hash of the code that it runs: its import closure, as far as it decides what is computed.

Docstrings, comments, formatting and the text of messages do not count. The data of the packages in the closure, such as
templates and weights, does.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

STAGES = Path(__file__).parents[1]
MESSAGE_CALLS = ("echo",)
"""Functions whose arguments are messages, beside the constructors of exceptions."""
LABEL_POSITION = {"track": 1}
"""Function -> position of its one argument that is a message."""


def code_record(stage: str) -> dict[str, Any]:
    """Describe the code of a stage, as the stage `code` writes it: its files and one hash over all."""
    files = stage_files(stage)
    return {"sha256": hash_files(files), "files": files}


def hash_code(stage: str) -> str:
    """Hash the code of a stage."""
    return hash_files(stage_files(stage))


def hash_files(files: dict[str, str]) -> str:
    """Combine the names and hashes of files: path -> sha256."""
    lines = (f"{path} {sha256}\n" for path, sha256 in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stage_files(stage: str) -> dict[str, str]:
    """Hash each file that the code of a stage consists of: path below stages/ -> sha256."""
    code = {_file_of(module) for module in import_closure(f"stages.{stage}.__main__")}
    data = {file for package in {path.parent for path in code} for file in _package_data(package)}
    return {path.relative_to(STAGES).as_posix(): _hash_file(path) for path in code | data}


def import_closure(module: str) -> set[str]:
    """List a module, every module of stages/ that it imports directly or indirectly, and the packages of them all.

    Imports inside functions count, imports for type checkers do not.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imported_modules(_file_of(name))
    return found | {package for name in found for package in _packages_of(name)}


@cache
def _imported_modules(path: Path) -> frozenset[str]:
    """List the modules of stages/ that a file imports."""
    names = {name for node in _statements(ast.parse(path.read_text())) for name in _imported_names(node)}
    modules = {name for name in names if name.split(".")[0] == STAGES.name}
    return frozenset(name if _file_of(name).is_file() else name.rpartition(".")[0] for name in modules)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """List a node and what it holds, without what stands below `if TYPE_CHECKING`."""
    yield node
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for child in node.orelse if isinstance(node, ast.If) and is_for_types else ast.iter_child_nodes(node):
        yield from _statements(child)


def _imported_names(node: ast.AST) -> Iterable[str]:
    """List the full names that a statement imports: of modules, or of what stands in them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def _packages_of(module: str) -> Iterator[str]:
    while module := module.rpartition(".")[0]:
        yield module


def _file_of(module: str) -> Path:
    path = STAGES.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _package_data(package: Path) -> Iterator[Path]:
    """List the files of a package, without Python files and without the packages in it."""
    for path in package.iterdir():
        if path.is_dir() and path.name != "__pycache__" and not any(path.glob("*.py")):
            yield from (file for file in path.rglob("*") if file.is_file())
        elif path.is_file() and path.suffix != ".py":
            yield path


def _is_copied(path: Path) -> bool:
    """Whether a file defines a pruned class: it is copied into every pruned model, so that each of its bytes counts."""
    return path.parent == STAGES / "models" and path.name.startswith("pruned_")


@cache
def _hash_file(path: Path) -> str:
    is_code = path.suffix == ".py" and not _is_copied(path)
    return hashlib.sha256(normalise(path.read_text()).encode() if is_code else path.read_bytes()).hexdigest()


def normalise(source: str) -> str:
    """Write Python source as its syntax tree, without docstrings, comments, positions and the text of messages."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        _blank_all(_messages(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _blank_message_variables(node)
    return _dump(tree)


def _messages(node: ast.AST) -> Iterator[ast.AST]:
    """List the expressions of a node that are messages."""
    if isinstance(node, ast.Raise) and node.exc:
        yield node.exc
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in MESSAGE_CALLS or name.endswith(("Error", "Exception")):
            yield from node.args
        yield from node.args[LABEL_POSITION.get(name, len(node.args)) :][:1]
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "help")


def _blank_message_variables(function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """Blank the strings assigned to variables of a function that only messages read."""
    nodes = list(ast.walk(function))
    messages = [message for node in nodes for message in _messages(node)]
    assigned = [node for node in nodes if isinstance(node, ast.Assign | ast.AugAssign | ast.NamedExpr)]
    known = -1
    while known < len(messages):
        known = len(messages)
        inside = {id(part) for message in messages for part in ast.walk(message)}
        reads = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        shown = {read.id for read in reads} - {read.id for read in reads if id(read) not in inside}
        messages += [
            node.value for node in assigned if id(node.value) not in inside and shown.issuperset(_targets(node))
        ]
    _blank_all(messages)


def _targets(node: ast.Assign | ast.AugAssign | ast.NamedExpr) -> set[str]:
    """List what a statement assigns, as source."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {ast.unparse(part) for target in targets for part in getattr(target, "elts", [target])}


def _blank(node: ast.AST) -> None:
    """Empty the strings of which an expression puts a message together; not those that it compares or looks up."""
    match node:
        case ast.Constant(value=str()):
            node.value = ""
        case ast.JoinedStr():
            node.values = [part for part in node.values if isinstance(part, ast.FormattedValue)]
            _blank_all(node.values)
        case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
            _blank_all(parts)
        case ast.BinOp(left=left, right=right) | ast.IfExp(body=left, orelse=right):
            _blank_all([left, right])
        case ast.Call(func=ast.Attribute(value=part), args=arguments):  # ", ".join(…)
            _blank_all([part, *arguments])
        case ast.Call(args=arguments):
            _blank_all(arguments)
        case ast.FormattedValue(value=part) | ast.GeneratorExp(elt=part) | ast.ListComp(elt=part):
            _blank(part)


def _blank_all(nodes: Iterable[ast.AST]) -> None:
    for node in nodes:
        _blank(node)


def _dump(node: object) -> str:
    """Write a node with all that it holds; empty fields are left out, since they differ between versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(_dump(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return f"{type(node).__name__}({','.join(f'{name}={_dump(value)}' for name, value in fields)})"


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
