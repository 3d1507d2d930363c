"""Sampling steps of params.yaml against the timesteps of a model."""

import pytest
from click.testing import CliRunner
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.fetch.__main__ import main as fetch
from stages.finetune.recovery import prepare
from stages.importance.__main__ import main as importance
from stages.models.pipeline import CPU, write_pipeline
from stages.models.steps import check_drawing
from stages.reference.__main__ import main as reference
from stages.runtime.errors import InputError

SAMPLES = "finetune: {samples: {every: 5, steps: %d}}\n"
REFERENCE = "reference: {sampler: {scheduler: %s, steps: %d}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SAMPLES % 20,
            r"finetune\.samples\.steps 20 does not divide the 50 timesteps of the model, .*; use a divisor$",
        ),
        ("finetune: {samples: {every: 5}}", r"finetune\.samples\.steps 20 does not divide the 50"),
        (REFERENCE % ("DDIM", 20), r"reference\.sampler\.steps 20 .*; use a divisor or another spacing$"),
        (REFERENCE % ("DDPM", 1), r"reference\.sampler: 1 leading steps .* begin at 0 of 50 timesteps"),
        (REFERENCE % ("DDIMM", 5), r"reference\.sampler\.scheduler is 'DDIMM'"),
    ],
)
def test_the_block_that_asked_is_named(tmp_path, text, message):
    """For a model of 50 timesteps."""
    (tmp_path / "params.yaml").write_text(text)

    with pytest.raises(InputError, match=message) as caught:
        check_drawing(tmp_path / "params.yaml", DDPMScheduler(num_train_timesteps=50, beta_end=0.3))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["seed: 0\n", "finetune: {samples: null}", SAMPLES % 10 + REFERENCE % ("DDPM", 25), SAMPLES % 50]
)
def test_what_can_be_drawn_passes(tmp_path, text):
    """Also without the blocks, and for a schedule that DDIM itself does not know."""
    (tmp_path / "params.yaml").write_text(text)

    for schedule in ("linear", "sigmoid"):
        scheduler = DDPMScheduler(num_train_timesteps=50, beta_end=0.3, beta_schedule=schedule)
        check_drawing(tmp_path / "params.yaml", scheduler)


def test_fetch_reference_and_importance_check_the_steps_of_samples(tmp_path, unet, root):
    """Before anything is computed, and nothing is written."""
    write_pipeline(tmp_path / "model", unet, DDPMScheduler(num_train_timesteps=50, beta_end=0.3))
    own = f"fetch:\n  model: {{source: folder, path: {tmp_path / 'model'}}}\n"
    text = (root / "params.yaml").read_text().replace("  model: {source: bundled, name: digits}\n", "", 1)
    text = text.replace("fetch:\n", own, 1).replace("steps: 50, eta", "steps: 5, eta")
    (tmp_path / "params.yaml").write_text(text)
    params = ["--params", str(tmp_path / "params.yaml")]
    inputs = [
        *params,
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    ]
    outputs = ["--model-out", str(tmp_path / "out"), "--data-out", str(tmp_path / "out-data")]
    for main, arguments in (
        (fetch, [*params, *outputs]),
        (reference, inputs),
        (importance, [*inputs, "--report", str(tmp_path / "report")]),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1, result.output
        assert "finetune.samples.steps 20 does not divide the 50 timesteps of the model" in result.stderr
        assert not (tmp_path / "out").exists()


def test_finetune_names_its_own_key_at_the_start(tmp_path, unet, params):
    """Before images and teacher are read."""
    write_pipeline(tmp_path / "model", unet, DDPMScheduler(num_train_timesteps=50, beta_end=0.3))

    with pytest.raises(InputError, match=r"finetune\.samples\.steps 20 does not divide the 50 timesteps"):
        prepare(tmp_path / "model", None, tmp_path / "nowhere", params.finetune, 0, CPU)
