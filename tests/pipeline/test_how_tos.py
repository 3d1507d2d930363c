"""README and how-tos: a reader types every command of a page, one after the other, in a project with small numbers."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from ruamel.yaml import YAML

from stages.models.pipeline import write_pipeline
from tests.conftest import TINY
from tests.markdown import ROOT, blocks, pages
from tests.orchestra import MARK, QUIET, command_line, descendants, until
from tests.repository import commit
from tests.servers import own_environment, s3_client, s3_environment
from tests.small_numbers import SMALL
from tests.swift import free_ports

HOW_TOS = [page for page in pages() if page.startswith("docs/how-to/") and not page.endswith("README.md")]
TYPED = ["README.md", *HOW_TOS]
"""The pages whose commands are run; those of the others are parsed only (test_commands.py)."""
NOT_RUN = 3
"""Blocks of these pages that no test runs: they need a GPU."""
RUN = {"sh", "diff", "python"}
FILES = ["Makefile", "pyproject.toml", "prefect.yaml", "recipes", "benchmarks", "mlflow"]
"""What a clone has beside the files that the pipeline needs."""
PORTS = ("5000", "8000", "4200")
"""Ports in the pages, each replaced by a free one."""


def test_what_is_not_run_says_why():
    """A mark before a block, which the reader does not see, gives the reason; every other block runs."""
    marked = [block for page in TYPED for block in blocks(page) if block.language in RUN and block.not_run]

    assert len(marked) <= NOT_RUN, [f"{block.place}: {block.not_run}" for block in marked]
    for block in marked:
        assert re.match(r"needs an? |takes |it is |downloads ", block.not_run), block.place


@pytest.mark.parametrize("page", TYPED)
def test_a_patch_of_a_page_fits_the_code(page):
    """A block of diff changes the files of this commit."""
    for block in blocks(page, "diff"):
        command = ["git", "apply", "--check", "-"]
        result = subprocess.run(command, input=block.text, cwd=ROOT, text=True, capture_output=True, check=False)
        assert result.returncode == 0, f"{block.place}: {result.stderr}"


@pytest.fixture
def reader(copy_finished, lenient, tmp_path):
    """The folder and the variables of somebody who made the default run and has a model and images at home."""
    project = copy_finished("reader").path
    for name in FILES:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        (shutil.copytree if source.is_dir() else shutil.copyfile)(
            source, project / name, **({"ignore": ignore} if source.is_dir() else {})
        )
    YAML().dump(lenient, project / "mlflow/promotion.yaml")
    home = tmp_path / "home"
    variables = {
        **own_environment(**QUIET),
        "HOME": str(home),
        "PYTHONPATH": str(project),  # the installation of a clone is its own code
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(tmp_path / "ui"),
        "SHRINK": str(ROOT / "tests/docs/shrink.py"),
        "SMALL_NUMBERS": json.dumps(SMALL),
        **{f"GIT_{who}_{what}": "reader@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    subprocess.run(
        [sys.executable, variables["SHRINK"], "recipes/presets/digits.yaml"], check=True, env=variables, cwd=project
    )
    _make_home(home)
    commit(project)
    record = [
        sys.executable,
        "-m",
        "stages.tracking",
    ]  # the copy has no database, since its paths would be those of the original
    subprocess.run(record, check=True, env=variables, cwd=project, capture_output=True)
    (project / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):  # Python looks beside bin/ for what makes it an environment
        (project / ".venv" / name).symlink_to(Path(sys.executable).parents[1] / name)
    (project / ".venv/.ready").touch()  # newer than requirements.lock, so that make has nothing to install
    return project, variables


def _make_home(home):
    """Put a small model of random weights and 200 pictures into the home folder."""
    unet = UNet2DModel(**{**TINY, "sample_size": 16})
    write_pipeline(home / "my-ddpm", unet, DDPMScheduler())
    (home / "my-images").mkdir()
    draws = np.random.default_rng(0)
    for index in range(200):
        Image.fromarray(draws.integers(0, 256, (16, 16), np.uint8)).save(home / f"my-images/{index:03}.png")


def make_script(page, ports):
    """Write the blocks of a page as one script for bash, each announced by its line."""
    lines = [(ROOT / "tests/docs/session.sh").read_text()]
    for number, block in enumerate(block for block in blocks(page) if block.language in RUN and not block.not_run):
        text = block.text
        for old, new in ports.items():
            text = re.sub(rf"(127\.0\.0\.1:|--port ){old}\b", rf"\g<1>{new}", text)
        if block.language == "python":
            text = f"python - <<'END OF BLOCK'\n{text}END OF BLOCK\n"
        elif block.language == "diff":
            text = f"git apply - <<'END OF BLOCK'\n{text}END OF BLOCK\n"
        lines.append(f"echo '== {block.place}'\n")
        if block.serves:
            log = f"../served-{number}.log"
            lines.append(f"{{\n{text}}} >{log} 2>&1 &\nserved+=($!)\nready {log} {shlex.quote(block.serves)}\n")
        else:
            lines.append(text)
    return "".join(lines)


@pytest.mark.e2e
@pytest.mark.timeout(1800, func_only=True)  # without the small run of the pipeline that all pages begin from
@pytest.mark.parametrize("page", TYPED)
def test_every_command_of_a_page_does_its_work(page, reader, swift, tmp_path):
    """Exit code 0 from each, in one shell; servers that a page starts run until its end, and leave no process."""
    project, variables = reader
    s3_client(swift).create_bucket(Bucket=f"bucket-{tmp_path.name.replace('_', '-').lower()}")
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    addresses = {key: value for key, value in s3_environment(swift).items() if value != os.devnull}  # home has no files
    variables |= addresses | {f"PORT_{name}": port for name, port in ports.items()}
    variables |= {"PREFECT_SERVER_API_PORT": ports["4200"], MARK: tmp_path.name}
    script = make_script(page, ports).replace("s3://bucket", f"s3://bucket-{tmp_path.name.replace('_', '-').lower()}")
    log = tmp_path / "log"
    with log.open("w") as lines:
        process = subprocess.Popen(["bash", "-c", script], cwd=project, env=variables, stdout=lines, stderr=lines)
    code = process.wait()
    print(log.read_text())

    assert code == 0, log.read_text()[-4000:]
    assert "Traceback" not in log.read_text()
    assert until(lambda: not descendants(tmp_path.name), 60), [command_line(it) for it in descendants(tmp_path.name)]
