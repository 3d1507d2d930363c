"""The URI of a version -> a diffusers pipeline."""

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stages.models.layout import is_pixel_dit
from stages.register.versions import downloaded, model_folder


def load_pipeline(uri: str) -> DiffusionPipeline:
    """Load models:/NAME/3 or models:/NAME@champion, after checking the hash of every file.

    Raises:
        InputError: The version does not exist, or a file is not as it was registered.
        UnavailableError: The server does not answer.
    """
    with downloaded(uri) as (_, files):
        model = model_folder(files)
        pipeline: Any = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
            model, trust_remote_code=True, low_cpu_mem_usage=False, **({"vae": None} if is_pixel_dit(model) else {})
        )
        modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        for tensor in (tensor for module in modules for tensor in module.parameters()):
            tensor.data = tensor.data.clone()  # the memory-mapped file is deleted with the temporary folder
    loaded: DiffusionPipeline = pipeline
    return loaded
