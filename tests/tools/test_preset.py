"""A preset replaces params.yaml without losing uncommitted changes."""

import shutil

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.params import Params, load_params
from stages.tools.__main__ import main
from tests.repository import commit, make_repository
from tests.servers import ROOT

PRESETS = sorted((ROOT / "recipes" / "presets").glob("*.yaml"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a committed params.yaml; it is the current folder."""
    shutil.copytree(ROOT / "recipes" / "presets", tmp_path / "recipes" / "presets")
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    make_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_valid_params_file(path):
    """Every preset loads without an error."""
    assert load_params(path)


def test_the_default_preset_is_digits():
    """params.yaml equals the preset digits byte for byte."""
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "recipes" / "presets" / "digits.yaml").read_bytes()


def test_committed_params_may_be_in_any_encoding(project):
    """They are compared byte for byte, and replaced."""
    (project / "params.yaml").write_bytes("# für uns\nseed: 1\n".encode("latin-1"))
    commit(project)

    result = CliRunner().invoke(main, ["preset", "digits"])
    assert result.exit_code == 0, result.output
    assert (project / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_a_preset_replaces_params(project):
    """A committed file and another preset are both replaced."""
    for name in ("cifar10", "mnist", "digits"):
        result = CliRunner().invoke(main, ["preset", name])
        assert (result.exit_code, result.output) == (0, f"params.yaml is now the preset {name}\n")
        assert (project / "params.yaml").read_bytes() == (ROOT / "recipes" / "presets" / f"{name}.yaml").read_bytes()


def test_a_missing_params_file_is_created(project):
    """A preset can be chosen without params.yaml."""
    (project / "params.yaml").unlink()

    assert CliRunner().invoke(main, ["preset", "mnist"]).exit_code == 0
    assert (project / "params.yaml").is_file()


def test_uncommitted_changes_need_force(project):
    """A params.yaml that equals neither a preset nor the committed file is overwritten only with --force."""
    (project / "params.yaml").write_text("seed: 2\n")
    refused = CliRunner().invoke(main, ["preset", "mnist"])

    assert refused.exit_code == 1
    assert refused.output.endswith("commit them, or give --force\n")
    assert (project / "params.yaml").read_text() == "seed: 2\n"
    assert CliRunner().invoke(main, ["preset", "mnist", "--force"]).exit_code == 0


def test_an_unknown_or_invalid_preset_is_refused(project):
    """One line lists the presets, or names the wrong value; params.yaml stays as it is."""
    (project / "recipes" / "presets" / "odd.yaml").write_text("seed: -1\n")

    unknown, odd = (CliRunner().invoke(main, ["preset", name]) for name in ("nonsense", "odd"))

    assert unknown.output.startswith("Error: there is no preset 'nonsense' in recipes/presets; choose one of celeba-")
    assert len(unknown.output.splitlines()) == 1
    assert "seed is -1" in odd.output
    assert (unknown.exit_code, odd.exit_code) == (1, 1)
    assert (project / "params.yaml").read_text() == "seed: 1\n"


def test_the_keys_of_the_authors_ldm_are_valid():
    """The keys that the page of imagenet-ldm lists give valid params in place of the preset's."""
    page = (ROOT / "docs" / "presets" / "imagenet-ldm.md").read_text()
    preset = load_params(ROOT / "recipes" / "presets" / "imagenet-ldm.yaml").model_dump(exclude_unset=True)
    for block, keys in YAML(typ="safe").load(page.split("```yaml")[1].split("```")[0]).items():
        preset[block] |= keys
    params = Params.model_validate(preset)

    assert (params.importance.formula, params.importance.draw.steps, params.importance.draw.guidance) == ("ldm", 20, 3)
    assert (params.prune.geglu, params.prune.target.ratio, params.reference.guidance) == ("halves", 0.3, 3)
