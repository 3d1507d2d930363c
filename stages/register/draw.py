"""Seeds -> images: the code of a model version, which MLflow loads; it does not import Espalier."""

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

BATCH_SIZE = 16


class Draw(PythonModel):
    """Draws with the sampler of the protocol under which the version was measured; equal seeds give equal images."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the diffusers pipeline and build the sampler, on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Path(context.artifacts["model"])
        self.settings = json.loads((Path(context.artifacts["evidence"]) / "sampler.json").read_text())
        diffusers.utils.logging.disable_progress_bar()
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
            str(model), trust_remote_code=True, low_cpu_mem_usage=False
        ).to(device)
        self.pipeline.unet = getattr(self.pipeline, "unet", None) or self.pipeline.transformer
        for tensor in self.pipeline.unet.parameters():  # memory-mapped tensors are not aligned, which changes rounding
            tensor.data = tensor.data.clone()
        self.pipeline.scheduler = getattr(diffusers, self.settings["class"])(**self.settings["config"])
        self.embeddings: torch.Tensor | None = None
        if self.settings["classes"]:
            table = load_file(model / "class_embedding" / "diffusion_pytorch_model.safetensors")["weight"].float()
            row = self.settings["without_class"]
            unconditional = torch.zeros(1, table.shape[1]) if row is None else table[row][None]
            self.embeddings = torch.cat([table[: self.settings["classes"]], unconditional])[:, None].to(device)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  # MLflow passes all three arguments
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """Draw one image for each row's `seed`, as PNG in base64: seeds -> [{"seed": 1, "png": "iVBOR…"}, …].

        A class-conditional model accepts a column `label`; a missing label is seed modulo the number of classes.
        """
        seeds = [int(seed) for seed in model_input["seed"]]
        requested = model_input["label"] if "label" in model_input else [None] * len(seeds)
        labels = [self._label(seed, label) for seed, label in zip(seeds, requested, strict=True)]
        batches = [slice(start, start + BATCH_SIZE) for start in range(0, len(seeds), BATCH_SIZE)]
        images = [image for batch in batches for image in self._draw(seeds[batch], labels[batch])]
        return [{"seed": seed, "png": _to_base64(image)} for seed, image in zip(seeds, images, strict=True)]

    def _label(self, seed: int, label: float | None) -> int:
        classes = self.settings["classes"] or 1
        number = seed % classes if label is None or pd.isna(label) else int(label)
        if not 0 <= number < classes:
            raise ValueError(f"label {number} is out of range; give 0 to {classes - 1}")
        return number

    @torch.inference_mode()
    def _draw(self, seeds: list[int], labels: list[int]) -> list[Image.Image]:
        """Denoise a batch; each image has its own generator, so that it does not depend on the rest of the batch."""
        unet, sampler = self.pipeline.unet, self.pipeline.scheduler
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = unet.config["sample_size"]
        shape = (unet.config["in_channels"], *([size, size] if isinstance(size, int) else size))
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sampler.set_timesteps(self.settings["steps"])
        images = (noise * sampler.init_noise_sigma).to(unet.device)
        for timestep in sampler.timesteps:
            epsilon = self._predict(sampler.scale_model_input(images, timestep), timestep, labels)
            images = sampler.step(epsilon, timestep, images, **self._step_options(generators)).prev_sample
        images = self._decode(images)
        pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]

    def _predict(self, images: torch.Tensor, timestep: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """Predict the noise; a class-conditional model is guided: eps(x) + scale * (eps(x, label) - eps(x)).

        Ho and Salimans, 2022, eq. 6, with w = scale - 1; a scale of None or 1 disables guidance.
        """
        unet, scale = self.pipeline.unet, self.settings["guidance"]
        if self.embeddings is None:
            return unet(images, timestep).sample  # type: ignore[no-any-return]
        conditions = self.embeddings[labels]
        if scale in (None, 1):
            return unet(images, timestep, encoder_hidden_states=conditions).sample  # type: ignore[no-any-return]
        both = torch.cat([self.embeddings[-1:].expand(len(labels), -1, -1), conditions])
        epsilon = unet(images.repeat(2, 1, 1, 1), timestep, encoder_hidden_states=both).sample
        unconditional, conditional = epsilon.chunk(2)
        return unconditional + scale * (conditional - unconditional)  # type: ignore[no-any-return]

    def _decode(self, images: torch.Tensor) -> torch.Tensor:
        """Decode latents z = (x - mean) * scale / std; without an autoencoder they are images already."""
        autoencoder = getattr(self.pipeline, "vqvae", None) or getattr(self.pipeline, "vae", None)
        if autoencoder is None:
            return images
        config = autoencoder.config
        means, stds = (
            config.get("latents_mean") or [config.get("shift_factor") or 0.0],
            config.get("latents_std") or [1.0],
        )
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (means, stds))
        return autoencoder.decode(images * std / self.settings["latent_scale"] + mean).sample  # type: ignore[no-any-return]

    def _step_options(self, generators: list[torch.Generator]) -> dict[str, Any]:
        options = {"generator": generators, "eta": self.settings["eta"]}
        return {name: options[name] for name in self.settings["takes"]}


def _to_base64(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


mlflow.models.set_model(Draw())
