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
from safetensors.torch import load_file

AT_ONCE = 16


class Draw(PythonModel):
    """Draws with the sampler of the protocol under which the version was measured; the same seed is the same image."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the diffusers pipeline and build the sampler, on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        home = Path(context.artifacts["model"])
        self.settings = json.loads((Path(context.artifacts["evidence"]) / "sampler.json").read_text())
        diffusers.utils.logging.disable_progress_bar()
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
            str(home), trust_remote_code=True, low_cpu_mem_usage=False
        ).to(device)
        for tensor in self.pipeline.unet.parameters():
            tensor.data = (
                tensor.data.clone()
            )  # those of a mapped file are not aligned, and kernels then round otherwise
        self.pipeline.scheduler = getattr(diffusers, self.settings["class"])(**self.settings["config"])
        self.table: torch.Tensor | None = None
        if self.settings["classes"]:
            embedding = load_file(home / "class_embedding" / "diffusion_pytorch_model.safetensors")["weight"].float()
            without = self.settings["without_class"]
            nothing = torch.zeros(1, embedding.shape[1]) if without is None else embedding[without][None]
            self.table = torch.cat([embedding[: self.settings["classes"]], nothing])[:, None].to(device)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  # MLflow passes all three
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """Give one PNG, in base64, for each row's `seed`: seeds -> [{"seed": 1, "png": "iVBOR…"}, …].

        A class-conditional model also takes a `label` with each; where none is given, the seed chooses one.
        """
        seeds = [int(seed) for seed in model_input["seed"]]
        given = model_input["label"] if "label" in model_input else [None] * len(seeds)
        labels = [self._choose(seed, label) for seed, label in zip(seeds, given, strict=True)]
        parts = [slice(start, start + AT_ONCE) for start in range(0, len(seeds), AT_ONCE)]
        images = [image for part in parts for image in self._draw(seeds[part], labels[part])]
        return [{"seed": seed, "png": _to_base64(image)} for seed, image in zip(seeds, images, strict=True)]

    def _choose(self, seed: int, label: float | None) -> int:
        classes = self.settings["classes"] or 1
        chosen = seed % classes if label is None or pd.isna(label) else int(label)
        if not 0 <= chosen < classes:
            raise ValueError(f"label {chosen} is no class; give 0 to {classes - 1}")
        return chosen

    @torch.inference_mode()
    def _draw(self, seeds: list[int], labels: list[int]) -> list[Image.Image]:
        """Denoise; all randomness of an image comes from its own generator, so the others in a batch change nothing."""
        unet, sampler = self.pipeline.unet, self.pipeline.scheduler
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"])
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sampler.set_timesteps(self.settings["steps"])
        images = (noise * sampler.init_noise_sigma).to(unet.device)
        for timestep in sampler.timesteps:
            epsilon = self._predict(sampler.scale_model_input(images, timestep), timestep, labels)
            images = sampler.step(epsilon, timestep, images, **self._options(generators)).prev_sample
        images = self._decode(images)
        pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pixels]

    def _predict(self, images: torch.Tensor, timestep: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """Predict noise, under the classes and guided where the model takes any."""
        unet, scale = self.pipeline.unet, self.settings["guidance"]
        if self.table is None:
            return unet(images, timestep).sample  # type: ignore[no-any-return]
        told, blank = self.table[labels], self.table[-1:].expand(len(labels), -1, -1)
        if scale in (None, 1):
            return unet(images, timestep, encoder_hidden_states=told).sample  # type: ignore[no-any-return]
        both = unet(images.repeat(2, 1, 1, 1), timestep, encoder_hidden_states=torch.cat([blank, told])).sample
        freely, guided = both.chunk(2)
        return freely + scale * (guided - freely)  # type: ignore[no-any-return]

    def _decode(self, images: torch.Tensor) -> torch.Tensor:
        """Make pictures of latents, where the pipeline has an autoencoder."""
        autoencoder = getattr(self.pipeline, "vqvae", None) or getattr(self.pipeline, "vae", None)
        return images if autoencoder is None else autoencoder.decode(images / self.settings["latent_scale"]).sample

    def _options(self, generators: list[torch.Generator]) -> dict[str, Any]:
        given = {"generator": generators, "eta": self.settings["eta"]}
        return {name: given[name] for name in self.settings["takes"]}


def _to_base64(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


mlflow.models.set_model(Draw())
