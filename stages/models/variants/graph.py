"""A model <-> an ONNX graph, which ONNX Runtime runs in its place."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.models.complexity import weights_bytes
from stages.models.families import Denoiser, example_inputs, family_of
from stages.models.variants.kinds import Kind
from stages.runtime.errors import InputError, first_line
from stages.runtime.wording import format_bytes
from stages.storage.files import cannot_write, read_bytes, write_atomically

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 20
"""Version of the operators of ONNX."""
MAX_FILE_BYTES = 2**31
"""Largest file of a graph, which is that of protobuf."""
MAX_BYTES = MAX_FILE_BYTES - 2**20
"""Largest weights of a graph."""
OUTPUT = "prediction"
SEQUENCE = "encoder_hidden_states"
"""The input whose second dimension may vary as well."""


def check_graph(model: Denoiser, kind: Kind) -> None:
    """Check that a model can become an ONNX graph, as far as that is known without exporting it.

    Raises:
        InputError: A package is missing, or the model is too large for one file.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        found = f"{kind.form} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise InputError(f"{found}; install the extra deploy, or leave {kind.form} out of variants.kinds")
    if weights_bytes(model) > MAX_BYTES:
        found = f"{kind.form}: the model has {format_bytes(weights_bytes(model))} of weights"
        raise InputError(f"{found}, and a file of ONNX holds 2 GiB; leave it out of variants.kinds")


class _Positional(nn.Module):
    """A model whose inputs are positional and whose output is a tensor."""

    def __init__(self, model: Denoiser, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, sample: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        output: torch.Tensor = self.model(sample, **dict(zip(self.names, rest, strict=True)), return_dict=False)[0]
        return output


def export_graph(model: Denoiser, kind: Kind, path: Path) -> None:
    """Write a model as an ONNX graph with its weights inside; equal models give equal files.

    Inputs: `sample` [B, C, H, W] float32, `timestep` [B] (float32, or int64 for a model with a table of timesteps), and
    the family's condition. Output: `prediction` [B, C', H, W]. The batch size is free.

    Args:
        model: A model on any device.
        kind: onnx, or int8-dynamic, whose products and convolutions are of 8 bits, with scales of activations that are
            found as it runs.
        path: The new file.

    Raises:
        InputError: A package is missing, or the model holds an operation that cannot be exported.
    """
    check_graph(model, kind)
    inputs = _graph_inputs(model)
    batch = torch.export.Dim.DYNAMIC
    axes = [{0: batch, 1: batch} if name == SEQUENCE else {0: batch} for name in inputs]
    names = list(inputs)
    try:
        with warnings.catch_warnings(action="ignore"), torch.inference_mode(mode=False), torch.no_grad():
            program = torch.onnx.export(
                _Positional(model, names[1:]).eval(),
                tuple(inputs.values()),
                dynamo=True,
                input_names=names,
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamic_shapes=(axes[0], tuple(axes[1:])),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # noqa: BLE001  # the exporter can fail in many ways
        found = f"PyTorch cannot export this model to ONNX ({first_line(error)})"
        raise InputError(f"{found}; leave {kind.form} out of variants.kinds") from None
    assert program is not None
    content = _plain(program.model_proto)
    write_atomically(path, _to_integers(content) if kind.form == "int8-dynamic" else content)


def _graph_inputs(model: Denoiser) -> dict[str, torch.Tensor]:
    """Build inputs of two images for the exporter, since it takes 1 for a size that is fixed."""
    inputs = example_inputs(model, 2)
    if family_of(model).known_timesteps(model) is None:
        inputs["timestep"] = inputs["timestep"].float()
    if SEQUENCE in inputs:
        inputs[SEQUENCE] = inputs[SEQUENCE].repeat(1, 2, 1)
    return inputs


def _plain(proto: Any) -> bytes:  # noqa: ANN401  # onnx is imported where it is used
    """Leave out what describes the export, such as lines of source code, and name the free dimension."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]
    free = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = "batch" if dim.dim_param == free else "sequence"
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _to_integers(content: bytes) -> bytes:
    """Quantise a graph for dynamic activations, with weights of 8 bits and one scale per output channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  # of the extra deploy

    with tempfile.TemporaryDirectory(prefix="espalier-") as folder, _quiet():
        source, target = Path(folder, "source.onnx"), Path(folder, "target.onnx")
        try:
            source.write_bytes(content)
            quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
        except OSError as error:
            raise cannot_write(source, error) from None
        return read_bytes(target, MAX_FILE_BYTES)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the quantiser logs as advice."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class GraphOutput:
    """What a model of diffusers returns."""

    sample: torch.Tensor


class GraphForward:
    """The forward of a model that ONNX Runtime runs on the CPU, with as many threads as PyTorch.

    Args:
        path: The graph.

    Raises:
        InputError: ONNX Runtime is missing, or refuses the graph.
    """

    def __init__(self, path: Path) -> None:
        if find_spec("onnxruntime") is None:
            raise InputError(f"{path} needs onnxruntime, which is not installed; install the extra deploy")
        import onnxruntime  # noqa: PLC0415  # of the extra deploy

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        content = read_bytes(path, MAX_FILE_BYTES)
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  # its exceptions have no common class
            raise InputError(f"ONNX Runtime cannot open {path} ({first_line(error)}); write it again") from None
        self.types = {it.name: torch.float32 if "float" in it.type else torch.int64 for it in self.session.get_inputs()}

    def __deepcopy__(self, _memo: dict[int, Any]) -> "GraphForward":
        """Return itself: a session has no state, and cannot be copied."""
        return self

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, **condition: torch.Tensor) -> GraphOutput:
        """Run the graph; one timestep counts for the whole batch."""
        inputs = {"sample": sample, "timestep": torch.as_tensor(timestep).reshape(-1).expand(len(sample)), **condition}
        arrays = {name: inputs[name].to("cpu", kind).contiguous().numpy() for name, kind in self.types.items()}
        (found,) = self.session.run([OUTPUT], arrays)
        return GraphOutput(torch.from_numpy(found).to(sample.device))


def runs_graph(model: Denoiser) -> bool:
    """Whether a model runs a graph, whose computation is float32 whatever the type of the model."""
    return isinstance(model.__dict__.get("forward"), GraphForward)


def input_types(model: Denoiser) -> dict[str, torch.dtype]:
    """Return the types of the inputs of a model that runs a graph."""
    forward = model.__dict__["forward"]
    assert isinstance(forward, GraphForward)
    return forward.types


def graph_model(model: Denoiser, path: Path) -> Denoiser:
    """Take all layers from a model, and let its forward run a graph."""
    for name, _ in list(model.named_children()):
        delattr(model, name)
    model.register_buffer("on_the_cpu", torch.zeros(()), persistent=False)  # what has no tensor has no device
    model.forward = GraphForward(path)
    return model.eval()
