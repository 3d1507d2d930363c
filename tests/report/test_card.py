"""The code in a model card draws with the model beside it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel

from stages.models.autoencoder import read_autoencoder
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.models.pipeline import write_pipeline
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.report import card
from stages.report.card import Use
from stages.report.report_data import _read_licence
from stages.report.templates import environment
from stages.storage.files import read_json, write_json
from stages.storage.tensors import write_tensors
from tests.conftest import AUTOENCODER


def use_of(folder, pipeline="DDPMPipeline", **flags):
    """The Python code of the section Use, with the path of a model folder."""
    text = Path(card.__file__).with_name("card.md.j2").read_text()
    section = text[text.index("## Use") : text.index("## Limits")]
    report = SimpleNamespace(pipeline=pipeline, code="unet/pruned_unet.py")
    rendered = (
        environment(autoescape=False)
        .from_string(section)
        .render(report=report, use=Use(**flags) if flags else card._read_use(folder))
    )
    return rendered.partition("```python")[2].partition("```")[0].replace("PATH/TO/THIS/FOLDER", str(folder))


def test_the_code_for_a_model_with_labels_and_variance_draws(make_unet, magnitude_of, scheduler, tmp_path):
    """Plain diffusers and the class that travels with the model; pipelines could pass no label."""
    unet = make_unet(num_class_embeds=5, out_channels=2, resnet_time_scale_shift="scale_shift")
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5})))
    write_pipeline(tmp_path, pruned, scheduler)
    names = {}
    torch.manual_seed(0)
    exec(use_of(tmp_path), names)  # the card's own code

    assert names["images"].shape == (1, 1, 8, 8)
    assert names["images"].isfinite().all()
    assert "class_labels" in use_of(tmp_path)
    assert "class_labels" not in use_of(tmp_path, has_variance=True)
    assert "pipeline().images[0]" in use_of(tmp_path, has_variance=False)


def test_the_code_for_latents_that_are_not_square_draws(make_unet, scheduler, tmp_path):
    """LDMPipeline takes the size for one number."""
    unet = make_unet(in_channels=3, out_channels=3, sample_size=[8, 16])
    VQModel(**AUTOENCODER, scaling_factor=0.5).save_pretrained(tmp_path / "source" / "vqvae")
    write_pipeline(tmp_path / "model", unet, scheduler, tmp_path / "source")
    names = {}
    exec(use_of(tmp_path / "model", "LDMPipeline"), names)  # the card's own code

    assert names["images"].shape == (1, 3, 16, 32)


@pytest.mark.parametrize("is_conditional", [False, True])
def test_the_code_for_a_latent_model_with_classes_decodes(make_unet, conditional, scheduler, tmp_path, is_conditional):
    """Of labels inside the model and of a class embedding beside it; the result is an image, not a latent."""
    unet = conditional if is_conditional else make_unet(in_channels=3, out_channels=3, num_class_embeds=5)
    source = tmp_path / "source"
    write_pipeline(source, unet, scheduler)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    coder = VQModel(block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5, **blocks)
    coder.save_pretrained(source / "vqvae")
    index = {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    write_json(source / "model_index.json", {**read_json(source / "model_index.json"), **index})
    if is_conditional:
        place = source / CLASS_EMBEDDING
        write_json(place / "config.json", {"num_classes": 4, "width": 12, "unconditional": None})
        write_tensors(place / WEIGHTS, {"weight": torch.randn(4, 12)})
    write_pipeline(tmp_path / "model", unet, scheduler, source)
    names = {}
    exec(use_of(tmp_path / "model", "LDMPipeline"), names)  # the card's own code

    assert card._read_use(tmp_path / "model").scale == "0.5"
    assert names["images"].shape == (1, 3, 16, 16)
    assert names["images"].isfinite().all()


SHIFTED = {"shift_factor": 0.3, "scaling_factor": 0.5}
MOVED = {"latents_mean": [0.5, -0.4, 0.3], "latents_std": [2.0, 1.5, 0.8], "scaling_factor": 0.5}


@pytest.mark.parametrize(
    ("pipeline", "place", "coder", "is_written_out"),
    [
        ("LDMPipeline", "vqvae", VQModel(**AUTOENCODER), False),
        ("LDMPipeline", "vqvae", AutoencoderKL(**AUTOENCODER), False),
        ("LDMPipeline", "vqvae", AutoencoderKL(**AUTOENCODER, **SHIFTED), True),
        ("LDMPipeline", "vae", AutoencoderKL(**AUTOENCODER, **MOVED), True),
        ("LDMPipeline", "vae", AutoencoderKL(**AUTOENCODER), False),
        ("DiTPipeline", "vae", AutoencoderKL(**AUTOENCODER), False),
        ("DiTPipeline", "vae", AutoencoderKL(**AUTOENCODER, **SHIFTED), True),
    ],
)
def test_the_code_for_latents_decodes_as_espalier(
    make_unet, make_dit, scheduler, tmp_path, pipeline, place, coder, is_written_out
):
    """With a scale that the config lacked, and with mean and std, which the pipelines of diffusers ignore."""
    make = make_unet if pipeline == "LDMPipeline" else make_dit
    unet = make(in_channels=3, out_channels=3)
    coder.save_pretrained(tmp_path / "source" / place)
    config = read_json(tmp_path / "source" / place / "config.json")
    if isinstance(coder, VQModel):
        torch.nn.init.normal_(coder.quantize.embedding.weight)  # by default so small that no scale changes the entry
        coder.save_pretrained(tmp_path / "source" / place)
        del config["scaling_factor"]
    write_json(tmp_path / "source" / place / "config.json", config)
    write_pipeline(tmp_path / "model", unet, scheduler, tmp_path / "source")
    code = use_of(tmp_path / "model", pipeline)
    names, latents = {}, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = read_autoencoder(tmp_path / "source", torch.device("cpu")).decode(latents)
    exec(code if is_written_out else code.rpartition("\npipeline")[0], names)  # the card's own code
    name = "vae" if pipeline == "DiTPipeline" else "vqvae"
    loaded = getattr(names["pipeline"], name)
    decoding = [line.strip() for line in code.splitlines() if ".decode(" in line]
    with torch.no_grad():
        names["images"] = latents if decoding else loaded.decode(latents / loaded.config.scaling_factor).sample
        exec("\n".join(decoding), names)
    torch.testing.assert_close(names["images"], expected)
    assert ("for timestep in" in code) == is_written_out
    if not isinstance(coder, VQModel):
        assert read_json(tmp_path / "model" / name / "config.json") == {
            key: value for key, value in config.items() if key != "_name_or_path"
        }


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\ntext", {"license": "mit"}),
        ("\n---\r\nlicense: mit\r\n--- \r\ntext\n---\n", {"license": "mit"}),
        ("---\nlicense: mit\n", {}),
        ("text\n---\nlicense: mit\n---\n", {}),
        ("---" + "\n" * 1_000_000, {}),
        ("", {}),
    ],
)
def test_the_licence_stands_between_two_lines_of_dashes(tmp_path, text, licence):
    """A card may hold anything, and is read in time that grows with its length alone."""
    (tmp_path / "README.md").write_text(text)
    assert _read_licence(tmp_path / "README.md") == licence
