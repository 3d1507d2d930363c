"""A variant -> its card, README.md."""

from pathlib import Path

from stages.models.variants.kinds import ROUNDED, Kind
from stages.storage.files import write_atomically

READ = "they become float32 as they are read, and it computes as fast as before."
WEIGHTS = f"in `integers.safetensors`; {READ}"
GRAPH = (
    "Inputs: `sample` [B, C, H, W], `timestep` [B] and, of a conditional model, its condition; output: `prediction`. "
    "The sampler is not in it."
)
FORMS = {
    "float32": "Weights: float32, as in the model that it was made from.",
    "int8": f"Weights: 8 bits, symmetric, one scale per output channel, {WEIGHTS}",
    "int4": f"Weights: 4 bits, symmetric, one scale for 64 weights of an output channel, {WEIGHTS}",
    "float8": f"Weights: floats of 8 bits (e4m3), one scale per output channel, in `float8.safetensors`; {READ}",
    "onnx": f"An ONNX graph in float32, `model.onnx`, with the weights inside. {GRAPH}",
    "int8-dynamic": "An ONNX graph, `model.onnx`, with products and convolutions of 8 bits: weights with one scale "
    f"per output channel, activations with a scale that is found as it runs. {GRAPH}",
}


def write_card(name: str, kind: Kind, path: Path) -> None:
    """Write what the variant is and how it is opened."""
    lines = [f"# {name} + {kind.name.replace('+', ' + ')}", "", FORMS[kind.form]]
    if kind.interval > 1:
        lines += ["", f"Its deep blocks run in one of {kind.interval} sampling steps and are reused in the others."]
    if kind.is_graph:
        opened = "`onnxruntime.InferenceSession(...)` opens the graph, without Espalier and PyTorch"
    elif kind.form in ROUNDED or kind.interval > 1:
        opened = "`stages.models.variants.folder.read_variant` opens it as a model of diffusers"
    lines += ["", f"`espalier draw --model FOLDER` draws with it; {opened}.", "", "`variant.json` has the hashes."]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
