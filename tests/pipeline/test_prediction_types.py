"""Models of v and x₀, in shards and with a schedule that ends at SNR 0, through the stages."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from ruamel.yaml import YAML

from stages.evaluate.__main__ import main as evaluate
from stages.fetch.__main__ import main as fetch
from stages.fetch.weights import STEM
from stages.finetune.__main__ import main as finetune
from stages.importance.__main__ import main as importance
from stages.models.layout import WEIGHTS
from stages.models.params import SamplerParams
from stages.models.pipeline import read_scheduler, read_unet, write_pipeline
from stages.models.sampling import draw, image_seeds
from stages.protocol.reference import read_reference
from stages.prune.__main__ import main as prune
from stages.reference.__main__ import main as reference
from stages.storage.files import read_json
from tests.few_images import FEW_IMAGES

CHANGES = {
    "fetch": {
        "model": {"source": "folder", "path": "model"},
        "data": {"source": "npz", "path": "images.npz"},
        "heldout": 0.25,
    },
    "reference": {
        "sampler": {"scheduler": "DDIM", "spacing": "trailing", "steps": 4},
        **FEW_IMAGES,
    },
    "importance": {"num_images": 4, "stride": 250, "report": None},
    "prune": {"compensate": {"num_images": 4, "num_timesteps": 2, "rounds": 2}},
    "finetune": {
        "steps": 80,
        "batch_size": 8,
        "loss": {"noise": 0.1, "output": 1.0, "feature": 0.1},
        "ema_decays": [0.5],
        "heldout_images": 8,
        "heldout_every": 20,
        "checkpoint_every": 20,
        "samples": {"every": 40, "num_images": 2, "steps": 4},
    },
}
STAGES = {
    fetch: "--model-out dense --data-out data",
    reference: "--model dense --data data --out reference",
    importance: "--model dense --data data --out importance --report reports/importance",
    prune: "--model dense --importance importance --data data --out pruned",
    finetune: "--model pruned --teacher dense --data data --checkpoints checkpoints --out finetuned "
    "--report reports/finetune",
    evaluate: "--dense dense --pruned pruned --finetuned finetuned --reference reference --report reports/evaluate",
}
"""Stage -> its folders, in order."""


@pytest.fixture(params=["v_prediction", "sample"])
def finished(request, tmp_path, root, make_unet, monkeypatch):
    """A folder with the outputs of every stage, of a model of 16×16 images (SSIM needs 11)."""
    monkeypatch.chdir(tmp_path)
    unet = make_unet(sample_size=16)
    write_pipeline(tmp_path / "model", unet, DDPMScheduler(prediction_type=request.param, rescale_betas_zero_snr=True))
    (tmp_path / "model/unet" / WEIGHTS).unlink()
    unet.save_pretrained(tmp_path / "model/unet", max_shard_size="60KB")
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (32, 4, 4)).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    params = YAML(typ="safe").load((root / "params.yaml").read_text())
    for block, changes in CHANGES.items():
        params[block] |= changes
    YAML().dump(params, tmp_path / "params.yaml")
    for main, options in STAGES.items():
        result = CliRunner().invoke(main, options.split())
        assert result.exit_code == 0, result.output
    return tmp_path, request.param


@pytest.mark.e2e
def test_a_model_of_v_or_x0_goes_through_every_stage(finished):
    """Recovery lowers the held-out loss, the metrics are finite, and diffusers draws as we do."""
    folder, kind = finished
    evaluation = read_json(folder / "reports/evaluate/evaluation.json")
    curve = np.genfromtxt(folder / "reports/finetune/curve.csv", delimiter=",", names=True)
    found = read_reference(folder / "reference")

    assert len(list((folder / "model/unet").glob(f"{STEM}-*"))) > 1
    for name in ("dense", "pruned", "finetuned"):
        config = read_json(folder / name / "scheduler/scheduler_config.json")
        assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == (kind, True)
    assert evaluation["models"]["finetuned"]["macs"] < evaluation["models"]["dense"]["macs"]
    assert all(np.isfinite(model["fid"]["mean"]) for model in evaluation["models"].values())
    assert curve["heldout_loss"][-1] < 0.8 * curve["heldout_loss"][0]
    dense = DDPMPipeline.from_pretrained(folder / "dense", low_cpu_mem_usage=False)
    expected = found.samples[0, :2].transpose(0, 2, 3, 1)
    assert np.abs(_draw_with_diffusers(dense, image_seeds(0, 2)) - expected).max() <= 1
    finetuned = DDPMPipeline.from_pretrained(folder / "finetuned", trust_remote_code=True, low_cpu_mem_usage=False)
    unet, scheduler = read_unet(folder / "finetuned"), read_scheduler(folder / "finetuned")
    sampler = SamplerParams(spacing="trailing", steps=4)
    expected = draw(unet, scheduler, [3, 4], sampler, batch_size=2, label="").transpose(0, 2, 3, 1)
    assert expected.std() > 1
    assert np.abs(_draw_with_diffusers(finetuned, [3, 4]) - expected).max() <= 1


def _draw_with_diffusers(pipeline, seeds):
    """Draw by DDIM in four trailing steps: levels of 0 to 255, [N, H, W, C]."""
    scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, "timestep_spacing": "trailing"})
    ddim = DDIMPipeline(pipeline.unet, scheduler)
    ddim.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    (images,) = ddim(len(seeds), generators, num_inference_steps=4, output_type="np", return_dict=False)
    return (images * 255).round()
