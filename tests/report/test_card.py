"""The code in a model card draws with the model beside it."""

from pathlib import Path
from types import SimpleNamespace

import torch

from stages.models.pipeline import write_pipeline
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.report import card
from stages.report.templates import environment


def use_of(folder, **flags):
    """The Python code of the section Use, with the path of a model folder."""
    text = Path(card.__file__).with_name("card.md.j2").read_text()
    section = text[text.index("## Use") : text.index("## Limits")]
    report = SimpleNamespace(pipeline="DDPMPipeline", code="unet/pruned_unet.py")
    rendered = environment(autoescape=False).from_string(section).render(report=report, **flags)
    return rendered.partition("```python")[2].partition("```")[0].replace("PATH/TO/THIS/FOLDER", str(folder))


def test_the_code_for_a_model_with_labels_and_variance_draws(make_unet, magnitude_of, scheduler, tmp_path):
    """Plain diffusers and the class that travels with the model; pipelines could pass no label."""
    unet = make_unet(num_class_embeds=5, out_channels=2, resnet_time_scale_shift="scale_shift")
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5})))
    write_pipeline(tmp_path, pruned, scheduler)
    names = {}
    torch.manual_seed(0)
    exec(use_of(tmp_path, has_labels=True, has_variance=True), names)  # the card's own code

    assert names["images"].shape == (1, 1, 8, 8)
    assert names["images"].isfinite().all()
    assert "class_labels" not in use_of(tmp_path, has_labels=False, has_variance=True)
    assert "pipeline().images[0]" in use_of(tmp_path, has_labels=False, has_variance=False)
