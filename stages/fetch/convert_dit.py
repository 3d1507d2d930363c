"""A checkpoint of the DiT authors (facebookresearch/DiT), and an autoencoder beside it -> a diffusers folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from stages.fetch.model_folder import check_links
from stages.fetch.pickles import check_state_dict, read_pickle
from stages.fetch.source_checkpoint import (
    Config,
    SourceCheckpoint,
    choose_ema,
    tensor_shapes,
    write_component,
    write_index,
)
from stages.fetch.weights import find_weights, read_weights, weights_files
from stages.models.families import AUTOENCODER_CLASSES, config_defaults
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256, read_json

DIT_NOISE = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "variance_type": "learned_range",
}
"""The authors draw with DDPM and a learned variance, and clip nothing."""
BLOCK = {
    "norm1.linear.": "adaLN_modulation.1.",
    "attn1.to_q.": "attn.q.",
    "attn1.to_k.": "attn.k.",
    "attn1.to_v.": "attn.v.",
    "attn1.to_out.0.": "attn.proj.",
    "ff.net.0.proj.": "mlp.fc1.",
    "ff.net.2.": "mlp.fc2.",
    "norm1.emb.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "norm1.emb.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "norm1.emb.class_embedder.embedding_table.": "y_embedder.embedding_table.",
}
"""Start of a name in a block of diffusers -> in a block of the authors; the embedders stand once, beside the blocks."""
TOP = {
    "pos_embed.proj.": "x_embedder.proj.",
    "proj_out_1.": "final_layer.adaLN_modulation.1.",
    "proj_out_2.": "final_layer.linear.",
}


def dit_name(name: str) -> str:
    """Translate a tensor name of DiTTransformer2DModel to the authors' code, with q, k and v apart."""
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    rest, rules = (block[2], BLOCK) if block else (name, TOP)
    old = next(old for old in rules if rest.startswith(old))
    translated = rules[old] + rest.removeprefix(old)
    is_shared = block is None or "embedder" in old
    return translated if is_shared else f"blocks.{block[1]}.{translated}"  # type: ignore[index]  # a block


def convert_dit(path: Path, config: Config, folder: Path, ema: bool | None = None) -> None:  # noqa: FBT001  # LAYOUTS
    """Convert a DiT: the published state dict, or a dict with the states `model` and `ema`.

    Queries, keys and values are divided, and each block gets its copy of the embedders of timestep and class, as in
    diffusers. Its embedding of the timestep spaces the frequencies by 1/127 of their range, the authors' by 1/128.

    Args:
        path: The checkpoint.
        config: Config of the DiTTransformer2DModel that it holds.
        folder: Where the pipeline is written.
        ema: Whether to take the EMA of a dict with both; None takes it.

    Raises:
        InputError: The checkpoint holds something else.
    """
    content = read_pickle(path)
    has_both = isinstance(content, dict) and {"model", "ema"} <= content.keys()
    sets = {False: content["model"], True: content["ema"]} if has_both else {False: content}
    states = {is_ema: check_state_dict(state, path) for is_ema, state in sets.items()}
    checkpoint = SourceCheckpoint(states[choose_ema(path, states, ema, by_default=True)], path)
    _divide(checkpoint, config["num_layers"])
    _check_positions(checkpoint, config)
    shapes = tensor_shapes(config)
    own = {name: shape for name, shape in shapes.items() if ".norm1.emb." not in name or ".0.norm1." in name}
    tensors = checkpoint.take(own, dit_name)
    checkpoint.check_empty()
    copies = {name: tensors[re.sub(r"\.\d+\.", ".0.", name, count=1)].clone() for name in shapes.keys() - own.keys()}
    write_component(folder / "transformer", config, {**tensors, **copies})
    write_index(folder, "DiTPipeline", DIT_NOISE, transformer=config)


def _divide(checkpoint: SourceCheckpoint, num_blocks: int) -> None:
    """Replace the fused layer of each attention by those of queries, keys and values, which follow one another in it.

    Raises:
        InputError: The outputs of such a layer cannot be divided by three.
    """
    for block in range(num_blocks):
        for kind in ("weight", "bias"):
            name = f"blocks.{block}.attn.qkv.{kind}"
            fused = checkpoint.tensors.pop(name, None)
            if fused is None:
                raise checkpoint.mismatch(f"{name} is missing")
            if not fused.ndim or len(fused) % 3:
                raise checkpoint.mismatch(f"{name} has shape {list(fused.shape)}, which is not three of one width")
            for side, part in zip("qkv", fused.chunk(3), strict=True):
                checkpoint.tensors[f"blocks.{block}.attn.{side}.{kind}"] = part


def _check_positions(checkpoint: SourceCheckpoint, config: Config) -> None:
    """Compare the table of positions, if the checkpoint has it, with the one that diffusers computes, and drop it.

    Raises:
        InputError: They differ.
    """
    width, side = config["num_attention_heads"] * config["attention_head_dim"], config["sample_size"]
    grid = side // config["patch_size"]
    expected = get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float()[None]
    found = checkpoint.tensors.pop("pos_embed", expected)
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-5):
        raise checkpoint.mismatch(f"pos_embed {list(found.shape)} is not that of {grid}×{grid} patches")


def add_autoencoder(source: Path, folder: Path, sha256: str | None = None) -> None:
    """Copy the autoencoder of a diffusers folder, or of its vae/, to vae/ of a converted pipeline.

    Raises:
        InputError: There is none, its class is not supported, or its weights have another hash than `sha256`.
    """
    place = source / "vae" if (source / "vae").is_dir() else source
    if not (place / "config.json").is_file():
        raise InputError(f"fetch.model.autoencoder: {place} holds no config.json; give the folder of an AutoencoderKL")
    check_links(source)
    check_links(place)
    config: Mapping[str, Any] = read_json(place / "config.json")
    name = str(config.get("_class_name"))
    if name not in AUTOENCODER_CLASSES:
        raise InputError(
            f"fetch.model.autoencoder: {place} holds a {name}; supported: {', '.join(AUTOENCODER_CLASSES)}"
        )
    files = find_weights(place)
    if not files:
        raise InputError(f"fetch.model.autoencoder: {place} holds no weights; give the folder of an AutoencoderKL")
    if sha256 is not None and (found := file_sha256(*weights_files(files[0]))) != sha256:
        wrong = f"fetch.model.autoencoder: {files[0]} has sha256 {found}, expected {sha256}"
        raise InputError(f"{wrong}; download it again or correct fetch.model.autoencoder_sha256")
    known = ("_class_name", *config_defaults(AUTOENCODER_CLASSES[name]))
    kept = {key: value for key, value in config.items() if key in known}
    write_component(folder / "vae", kept, read_weights(files[0]))
