"""The paper's systems through every stage: CIFAR-10 at its real size, a small one in place of ImageNet's latent one."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from benchmarks import systems
from stages.data.images import read_images
from stages.fetch.convert import LDM_NOISE
from stages.models.pipeline import write_pipeline
from stages.protocol.reference import read_reference
from stages.storage.files import read_json, write_json
from stages.storage.tensors import write_tensors
from tests.all_stages import run_all_stages


@pytest.mark.e2e
def test_cifar10_has_the_sizes_of_the_paper_after_every_stage(tmp_path):
    """35.7463 M / 6.0641 G becomes 19.8512 M / 3.3919 G; measure() ends the program where it does not."""
    systems.make_inputs("cifar10", tmp_path)
    row = systems.measure("cifar10", tmp_path)

    assert "| cifar10 | 35.7463 M / 6.0641 G | 19.8512 M / 3.3919 G |" in row


def test_a_latent_model_of_classes_goes_through_every_stage(tmp_path, conditional, monkeypatch):
    """It trains on latents, draws under guidance, and its pictures are decoded before anything looks at them."""
    write_pipeline(tmp_path / "model", conditional, DDPMScheduler.from_config(LDM_NOISE))
    torch.manual_seed(0)
    small = {**systems.VQ_F4, "block_out_channels": (8, 8, 16), "norm_num_groups": 4, "num_vq_embeddings": 64}
    VQModel(**small).save_pretrained(tmp_path / "model" / "vqvae")
    index = read_json(tmp_path / "model" / "model_index.json")
    write_json(tmp_path / "model" / "model_index.json", {**index, "vqvae": ["diffusers", "VQModel"]})
    folder = tmp_path / "model" / "class_embedding"
    write_json(folder / "config.json", {"num_classes": systems.CLASSES, "width": 12, "unconditional": systems.CLASSES})
    write_tensors(folder / "diffusion_pytorch_model.safetensors", {"weight": torch.randn(systems.CLASSES + 1, 12)})
    systems.make_data(systems.System("imagenet-ldm", (0, 0), (0, 0), 40), tmp_path / "pictures")
    systems.make_params("imagenet-ldm", tmp_path)
    monkeypatch.chdir(tmp_path)
    run_all_stages()
    images = read_images(tmp_path / "artifacts" / "data")
    reference = read_reference(tmp_path / "artifacts" / "reference")
    evaluation = read_json(tmp_path / "reports" / "evaluate" / "evaluation.json")

    assert images.train.shape == (16, 3, 8, 8)
    assert images.train.dtype == np.float16
    assert images.pixels.shape == (16, 3, 32, 32)
    assert images.conditions.table.shape == (systems.CLASSES + 1, 1, 12)
    assert reference.samples.shape == (1, 4, 3, 32, 32)
    assert reference.protocol.guidance == 1.5
    assert evaluation["models"]["finetuned"]["macs"] < evaluation["models"]["dense"]["macs"]
    for made in ("finetuned", "released/finetuned"):
        folder = tmp_path / "artifacts" / made
        assert (folder / "vqvae" / "config.json").is_file()
        assert (folder / "class_embedding" / "config.json").is_file()
