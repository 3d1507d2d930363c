"""Seeds -> images: the code of a model version, which MLflow loads; it does not import Espalier."""

import base64
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import mlflow
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image
from safetensors.torch import load_file

BATCH_SIZE = 16
Denoiser = Callable[..., torch.Tensor]
"""Noisy images [B, C, H, W], timestep and condition -> prediction [B, C', H, W]."""


class Draw(PythonModel):
    """Draws with the sampler of the protocol under which the version was measured; equal seeds give equal images."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the diffusers pipeline and build the sampler, on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Path(context.artifacts["model"])
        self.settings = json.loads((Path(context.artifacts["evidence"]) / "sampler.json").read_text())
        diffusers.utils.logging.disable_progress_bar()
        is_pixel_dit = (model / "transformer").is_dir() and not (model / "vae").is_dir()
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
            str(model), trust_remote_code=True, low_cpu_mem_usage=False, **({"vae": None} if is_pixel_dit else {})
        ).to(device)
        if "unet" not in self.pipeline.components:
            self.pipeline.unet = self.pipeline.transformer
        for tensor in self.pipeline.unet.parameters():  # memory-mapped tensors are not aligned, which changes rounding
            tensor.data = tensor.data.clone()
        self.pipeline.scheduler = getattr(diffusers, self.settings["class"])(**self.settings["config"])
        self.conditions = self._read_conditions(model).to(device) if self.settings["classes"] else None
        folder = Path(context.artifacts["variants"]) if "variants" in context.artifacts else None
        self.variants = {} if folder is None else {path.name: path for path in sorted(folder.iterdir())}
        self.graphs: dict[str, Denoiser] = {}

    def _read_conditions(self, model: Path) -> torch.Tensor:
        """Return what the model gets for each class, last for no class: labels [K + 1], or embeddings [K + 1, 1, D]."""
        classes, empty = self.settings["classes"], self.settings["without_class"]
        if self.settings["condition"] == "class_labels":
            return torch.tensor([*range(classes), empty])
        table = load_file(model / "class_embedding" / "diffusion_pytorch_model.safetensors")["weight"].float()
        unconditional = torch.zeros(1, table.shape[1]) if empty is None else table[empty][None]
        return torch.cat([table[:classes], unconditional])[:, None]

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  # MLflow passes all three arguments
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Draw one image for each row's `seed`, as PNG in base64: seeds -> [{"seed": 1, "png": "iVBOR…"}, …].

        A class-conditional model accepts a column `label`; a missing label is seed modulo the number of classes. The
        parameter `variant` is the kind of a variant that ONNX Runtime runs on the CPU in place of the model.
        """
        denoiser = self._denoiser((params or {}).get("variant"))
        seeds = [int(seed) for seed in model_input["seed"]]
        requested = model_input["label"] if "label" in model_input else [None] * len(seeds)
        labels = [self._label(seed, label) for seed, label in zip(seeds, requested, strict=True)]
        batches = [slice(start, start + BATCH_SIZE) for start in range(0, len(seeds), BATCH_SIZE)]
        images = [image for batch in batches for image in self._draw(seeds[batch], labels[batch], denoiser)]
        return [{"seed": seed, "png": _to_base64(image)} for seed, image in zip(seeds, images, strict=True)]

    def _label(self, seed: int, label: float | None) -> int:
        classes = self.settings["classes"] or 1
        number = seed % classes if label is None or pd.isna(label) else int(label)
        if not 0 <= number < classes:
            raise ValueError(f"label {number} is out of range; give 0 to {classes - 1}")
        return number

    def _denoiser(self, variant: str | None) -> Denoiser:
        """Return the model, or the graph of a variant, which is opened when it is first asked for."""
        if variant is None:
            return lambda *inputs, **condition: self.pipeline.unet(*inputs, **condition).sample
        paths = {kind: path for kind, folder in self.variants.items() for path in folder.glob("*/model.onnx")}
        if variant not in paths:
            found = "Espalier alone opens it" if variant in self.variants else "the version does not hold it"
            allowed = ", ".join([*paths, "no variant for the model"])
            raise MlflowException.invalid_parameter_value(f"variant {variant!r}: {found}; allowed: {allowed}")
        if variant not in self.graphs:
            self.graphs[variant] = _open_graph(paths[variant])
        return self.graphs[variant]

    @torch.inference_mode()
    def _draw(self, seeds: list[int], labels: list[int], denoiser: Denoiser) -> list[Image.Image]:
        """Denoise a batch; each image has its own generator, so that it does not depend on the rest of the batch.

        A server draws for several requests at once, each with a sampler of its own.
        """
        unet, sampler = self.pipeline.unet, copy.deepcopy(self.pipeline.scheduler)  # it keeps a state between its steps
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = unet.config["sample_size"]
        shape = (unet.config["in_channels"], *([size, size] if isinstance(size, int) else size))
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sampler.set_timesteps(self.settings["steps"])
        images = (noise * sampler.init_noise_sigma).to(unet.device)
        for timestep in sampler.timesteps:
            seen = timestep.long() if self.settings["whole_timesteps"] else timestep  # of a table of the model
            output = self._predict(sampler.scale_model_input(images, timestep), seen, labels, denoiser)
            if sampler.config.get("variance_type") != "learned_range":  # of DDPM, which takes the learned variance
                output = output[:, : shape[0]]
            images = sampler.step(output, timestep, images, **self._step_options(generators)).prev_sample
        images = self._decode(images)
        pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]

    def _predict(
        self, images: torch.Tensor, timestep: torch.Tensor, labels: list[int], denoiser: Denoiser
    ) -> torch.Tensor:
        """Predict the noise; a class-conditional model is guided: eps(x) + scale * (eps(x, label) - eps(x)).

        Ho and Salimans, 2022, eq. 6, with w = scale - 1; a scale of None or 1 disables guidance. A learned variance
        beside the noise is that of the label.
        """
        scale, table = self.settings["guidance"], self.conditions
        if table is None:
            return denoiser(images, timestep)
        name, channels = self.settings["condition"], images.shape[1]
        if scale in (None, 1):
            return denoiser(images, timestep, **{name: table[labels]})
        both = {name: table[[*[-1] * len(labels), *labels]]}
        output = denoiser(images.repeat(2, 1, 1, 1), timestep, **both)
        unconditional, conditional = output[:, :channels].chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        return torch.cat([guided, output[len(labels) :, channels:]], dim=1)

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


def _open_graph(path: Path) -> Denoiser:
    """Open an ONNX graph, whose inputs are `sample`, `timestep` [B] and a condition; it computes in float32."""
    try:
        import onnxruntime
    except ImportError:
        raise MlflowException.invalid_parameter_value(
            "a variant needs onnxruntime, which is not installed; install it, or ask for no variant"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {it.name: torch.float32 if "float" in it.type else torch.int64 for it in session.get_inputs()}

    def predict(images: torch.Tensor, timestep: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        """Run the graph: [B, C, H, W] and a timestep [] or [1] -> the prediction [B, C, H, W] on the images' device."""
        inputs = {"sample": images, "timestep": timestep.reshape(-1).expand(len(images)), **condition}
        arrays = {name: inputs[name].to("cpu", kind).contiguous().numpy() for name, kind in types.items()}
        return torch.from_numpy(session.run(["prediction"], arrays)[0]).to(images.device)

    return predict


def _to_base64(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


mlflow.models.set_model(Draw())
