"""The rules of the house, as tests."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from flows.workspaces.workspace import current_checkout
from stages.params import Params
from stages.tracking.compression import stage_folders

ROOT = Path(__file__).parents[1]
DVC = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
HEAVY = {"diffusers", "mlflow", "prefect", "torch"}


def test_a_stage_is_called_by_one_word_everywhere(monkeypatch):
    """The words of dvc.yaml, params.yaml, the folders with a __main__, the record and the flow are the same."""
    monkeypatch.chdir(ROOT)
    stages = list(DVC)
    optional = {"grid"}  # read by a command, so that it may be missing
    blocks = [name for name in Params.model_fields if name not in {"seed", *optional}]

    assert blocks == [stage for stage in stages if stage in DVC[stage].get("params", [])]
    assert blocks == list(YAML(typ="safe").load((ROOT / "params.yaml").read_text()))[1:]
    assert [stage for stage in stages if stage not in ("code", "report")] == list(stage_folders(Path(), Path()))
    commands = {"grid", "register", "tracking", "tools"}  # which DVC does not run
    assert {path.parent.name for path in (ROOT / "stages").glob("*/__main__.py")} == {*stages, *commands}
    assert stages == [stage.name for stage in current_checkout().stages]


def test_stages_holds_packages_and_the_whole_of_params():
    """Every line of code has a package; no loose module stands beside them."""
    assert {path.name for path in (ROOT / "stages").glob("*.py")} == {"__init__.py", "params.py"}


@pytest.mark.parametrize("stage", [stage for stage in DVC if stage != "code"])
def test_a_stage_depends_on_its_own_code_and_on_data(stage):
    """Its source is in the hash that the stage code writes, so no file of stages/ is a dependency itself."""
    deps = DVC[stage]["deps"]

    assert f"artifacts/code/{stage}.json" in deps
    assert [dep for dep in deps if dep.startswith(("stages", "artifacts/code/"))] == [f"artifacts/code/{stage}.json"]
    assert DVC[stage]["cmd"].startswith(f"python -m stages.{stage} ")


def test_import_mlflow_is_the_real_one():
    """The folder mlflow/ beside it does not shadow the package, not even from the project's root."""
    found = importlib.util.find_spec("mlflow")

    assert found is not None
    assert found.origin is not None
    assert "site-packages" in found.origin
    assert list((ROOT / "mlflow").rglob("*.py")) == []


def test_nothing_of_ours_pickles():
    """Only an error's name comes from pickle, torch.save is never called, and torch.load only with weights_only."""
    banned = {"cloudpickle", "dill", "joblib"}
    for path in [*(ROOT / "stages").rglob("*.py"), *(ROOT / "flows").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "pickle" not in names, path
            module = [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {str(name).split(".")[0] for name in [*names, *module]}, path
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert [alias.name for alias in node.names] == ["UnpicklingError"], path
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {alias.name for alias in node.names} & {"load", "save"}, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
                assert "weights_only=True" in ast.unparse(node), path


def test_only_families_know_the_classes_of_models():
    """Elsewhere no module imports a class of denoisers or the blocks inside, so that a family is one module."""
    known = ("diffusers.models.unets", "diffusers.models.transformers", "diffusers.models.resnet")
    own = ROOT / "stages" / "models"
    for path in [*(ROOT / "stages").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        if path.parent == own / "families" or (path.parent == own and path.name.startswith("pruned_")):
            continue
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in imports if str(node.module).startswith(known)], path


def heavy_imports(modules):
    """List what is heavy of all that these modules import."""
    code = f"import sys, {modules}; print(*(name for name in {sorted(HEAVY)!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize(
    "module", [*(f"stages.{stage}.__main__" for stage in DVC), "stages.tracking.__main__", "flows.__main__"]
)
def test_the_command_lines_import_nothing_heavy(module):
    """--help answers at once, because arguments are parsed before anything heavy is imported."""
    assert heavy_imports(module).split() == []


def test_records_are_read_without_pytorch():
    """What compares or writes records, or has nothing to compute, then starts at once."""
    protocol = "stages.protocol.evaluation, stages.protocol.variants, stages.protocol.costs, stages.protocol.verdict"
    others = "stages.storage.provenance, stages.variants.outputs, stages.tools.diff, stages.tools.comparison.methods"
    assert heavy_imports(f"{protocol}, {others}").split() == []


def test_the_lock_names_no_registry():
    """requirements.lock holds hashes and no address."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()

    assert any(line.strip().startswith("--hash=sha256:") for line in lines)
    assert [line for line in lines if "://" in line or line.startswith(("--index", "--find-links"))] == []


def test_every_package_that_is_imported_is_declared():
    """One that comes with another would be gone when that one gives it up; what nothing imports is not declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(it for extra in project["optional-dependencies"].values() for it in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in listed}
    owners = {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}
    modules = {module for module in _imported_modules() if module in owners and module not in ("flows", "stages")}

    assert [module for module in sorted(modules) if not owners[module] & declared] == []
    used = set().union(*(owners[module] for module in modules))
    not_imported = {"dvc", "onnx", "onnxscript", "psycopg2-binary"}  # a command, and what others import
    assert declared - used - not_imported == {"fastapi", "sqlalchemy"}  # whose newer versions break Prefect


def _imported_modules():
    """Find the top-level modules that the code of the package imports, also within functions."""
    for path in [it for folder in ("flows", "stages") for it in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield (node.module or "").partition(".")[0]
