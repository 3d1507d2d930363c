"""A model version -> images from seeds: MLflow runs this file, which travels with the version and needs no Espalier."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import diffusers
import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

AT_ONCE = 16


class Draw(PythonModel):
    """Draws with the sampler of the protocol under which the version was measured; the same seed is the same image."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the diffusers pipeline and build the sampler, on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.settings = json.loads((Path(context.artifacts["evidence"]) / "sampler.json").read_text())
        diffusers.utils.logging.disable_progress_bar()
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
            context.artifacts["model"], trust_remote_code=True, low_cpu_mem_usage=False
        ).to(device)
        for tensor in self.pipeline.unet.parameters():
            tensor.data = (
                tensor.data.clone()
            )  # those of a mapped file are not aligned, and kernels then round otherwise
        self.pipeline.scheduler = getattr(diffusers, self.settings["class"])(**self.settings["config"])

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  # MLflow passes all three
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """Give one PNG, in base64, for each row's `seed`: seeds -> [{"seed": 1, "png": "iVBOR…"}, …]."""
        seeds = [int(seed) for seed in model_input["seed"]]
        images = [image for start in range(0, len(seeds), AT_ONCE) for image in self._draw(seeds[start:][:AT_ONCE])]
        return [{"seed": seed, "png": _to_base64(image)} for seed, image in zip(seeds, images, strict=True)]

    @torch.inference_mode()
    def _draw(self, seeds: list[int]) -> list[Image.Image]:
        """Denoise; all randomness of an image comes from its own generator, so the others in a batch change nothing."""
        unet, sampler = self.pipeline.unet, self.pipeline.scheduler
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"])
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sampler.set_timesteps(self.settings["steps"])
        images = (noise * sampler.init_noise_sigma).to(unet.device)
        for timestep in sampler.timesteps:
            epsilon = unet(sampler.scale_model_input(images, timestep), timestep).sample
            images = sampler.step(epsilon, timestep, images, **self._options(generators)).prev_sample
        pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pixels]

    def _options(self, generators: list[torch.Generator]) -> dict[str, Any]:
        given = {"generator": generators, "eta": self.settings["eta"]}
        return {name: given[name] for name in self.settings["takes"]}


def _to_base64(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


mlflow.models.set_model(Draw())
