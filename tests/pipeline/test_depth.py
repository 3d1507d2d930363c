"""The digits lose residual branches and channels, and go through every stage."""

import pytest
import torch
from diffusers import DDPMPipeline
from ruamel.yaml import YAML

from stages.models.layout import PLAN
from stages.models.pipeline import read_unet
from stages.models.plan import read_plan
from stages.storage.files import read_json
from tests.all_stages import run_all_stages

CHANGES = {
    "reference": {"sampler": {"steps": 4}, "num_images": 8, "sets": 2, "batch_size": 8, "kid_subset_size": 4},
    "importance": {"num_images": 4, "stride": 200, "report": None},
    "prune": {"target": {"macs": "60%"}, "depth": {"remove": 2, "num_images": 2, "num_timesteps": 1}},
    "finetune": {
        "steps": 6,
        "batch_size": 8,
        "heldout_images": 8,
        "heldout_every": 3,
        "checkpoint_every": 3,
        "ema_decays": [0.5],
        "samples": None,
    },
    "costs": {"batches": [1], "precisions": ["float32"], "repeats": 6, "seconds": 0.1},
}


@pytest.mark.e2e
def test_a_shallower_model_goes_through_every_stage(tmp_path, root, monkeypatch):
    """The branches of the plan are gone from the released model, and card and page name them."""
    yaml = YAML()
    params = yaml.load(root / "params.yaml")
    for block, changes in CHANGES.items():
        params[block].update(changes)
    yaml.dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    run_all_stages()
    released = tmp_path / "artifacts" / "released" / "finetuned"
    unet, removed = read_unet(released), [branch.name for branch in read_plan(released / PLAN).removed]
    plain = DDPMPipeline.from_pretrained(released, trust_remote_code=True).unet
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    models = read_json(tmp_path / "reports" / "evaluate" / "evaluation.json")["models"]

    assert len(removed) == 2
    assert sorted(unet.config["removed_branches"]) == sorted(removed)
    assert all(torch.equal(tensor, unet.get_parameter(name)) for name, tensor in plain.named_parameters())
    with torch.no_grad():  # weights in a mapped file may be aligned otherwise, and kernels then round otherwise
        torch.testing.assert_close(plain(noise, 3).sample, unet(noise, 3).sample)
    assert models["finetuned"]["macs"] == pytest.approx(0.6 * models["dense"]["macs"], rel=0.01)
    assert ", ".join(removed) in (released / "README.md").read_text()
    assert ", ".join(removed) in (tmp_path / "reports" / "index.html").read_text()
