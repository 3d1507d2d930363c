"""LoRA adapters of small models, in the layouts of peft, of diffusers now and before, and of kohya."""

import torch
from torch import nn

SCALE = 0.5
"""s of W + s·B·A."""
PEFT = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None
LAYOUTS = {
    "peft": PEFT,
    "peft, bare": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None),
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "unet.{}.alpha"),
    "diffusers, transformer": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "diffusers 0.20": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", None),
    "processors": ("{}_lora.down.weight", "{}_lora.up.weight", None),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}
"""Layout -> the names of A, B and alpha; {} is the layer."""
EMBEDDING = "base_model.model.{}.lora_embedding_A", "base_model.model.{}.lora_embedding_B"
BIAS = "base_model.model.{}.lora_B.bias"


def layer_name(layer, layout):
    """Write the name of a layer as a layout does."""
    if layout == "kohya":
        return layer.replace(".", "_")
    if layout == "processors" and ".to_" in layer:
        parent, _, name = layer.partition(".to_")
        return f"{parent}.processor.to_{name.removesuffix('.0')}"
    return layer


def make_factor(shape, seed, *, exact):
    """Draw small integers, whose sums are exact in any order, or normal numbers."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=draws).float() if exact else torch.randn(shape, generator=draws)


def make_lora(model, layers, layout="peft", rank=3, *, exact=True, bias=True):
    """Make an adapter of some layers: the tensors of its file, and layer -> its names of A, B and a bias, if peft's."""
    tensors, names = {}, {}
    for seed, layer in enumerate(sorted(layers)):
        module, written = model.get_submodule(layer), layer_name(layer, layout)
        outputs, inputs, *kernel = module.weight.shape
        down, up, alpha = LAYOUTS[layout]
        shapes = (rank, inputs, *kernel), (outputs, rank, *(1 for _ in kernel))
        if isinstance(module, nn.Embedding):
            (down, up), shapes = EMBEDDING, ((rank, outputs), (inputs, rank))
        names[layer] = [down.format(written), up.format(written)]
        if bias and layout == "peft" and getattr(module, "bias", None) is not None:
            names[layer].append(BIAS.format(written))
            shapes = (*shapes, (outputs,))
        for number, (name, shape) in enumerate(zip(names[layer], shapes, strict=True)):
            tensors[name] = make_factor(shape, 10 * seed + number, exact=exact)
        if alpha:
            tensors[alpha.format(written)] = torch.tensor(SCALE * rank)
    return tensors, names


def product(module, down, up):
    """Compute B·A in the shape of a layer's weight."""
    if isinstance(module, nn.Embedding):
        return (up @ down).T
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def merge(model, tensors, names, scale=SCALE):
    """Return the model's tensors with W + s·B·A, and biases with those of the LoRA."""
    merged = dict(model.state_dict())
    for layer, (down, up, *bias) in names.items():
        module = model.get_submodule(layer)
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + scale * product(module, tensors[down], tensors[up])
        if bias:
            merged[f"{layer}.bias"] = merged[f"{layer}.bias"] + scale * tensors[bias[0]]
    return merged
