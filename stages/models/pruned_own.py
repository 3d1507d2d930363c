"""Denoisers of any class, and of any widths, for plain diffusers. Every folder of such a model holds a copy.

It needs only torch and diffusers. The folder also holds `denoiser.py`, the class itself, and `pruned_denoiser.py`,
which puts both together. The config is the keys of the class's constructor and more: `denoiser_class` (its name),
`description` (what the model takes and returns), `pruned_widths` (layer -> [outputs, inputs], [channels] for a norm,
[rows, columns] for an embedding) and `pruned_heads` (attention -> heads).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

CLASS_NAME = "PrunedDenoiser"
PRUNED_KEYS = ("pruned_widths", "pruned_heads")
CLASS_KEY = "denoiser_class"
KEYS = (CLASS_KEY, "description", *PRUNED_KEYS, "auto_map")
"""Keys of a config that no constructor takes."""
SAMPLE_KEYS = ("sample_size", "in_channels")
"""Keys that every config has, and the constructor only if it takes them."""
RESERVED = ("config", "device", "dtype", "from_config", "from_pretrained", "register_to_config")
"""Names of diffusers that the class must not have."""
CONDITIONS = ("labels", "encoder_states")
"""Inputs of a description that are conditions; a model has one of them at most."""


class OwnDenoiser(ModelMixin, ConfigMixin):
    """A model of any class that takes and returns what a UNet of diffusers does."""

    config_name = "config.json"  # type: ignore[assignment]  # as the models of diffusers do
    espalier_code: type[nn.Module]
    """The class itself."""
    espalier_heads: dict[str, int]
    """Attention -> its number of heads."""

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Set an attribute.

        Raises:
            AttributeError: diffusers needs one of that name for itself.
        """
        if name in RESERVED:
            raise AttributeError(f"{name} is a name that diffusers needs; rename the attribute")
        super().__setattr__(name, value)


def make_class(code: type[nn.Module]) -> Any:  # noqa: ANN401  # a class that is made here has no type of its own
    """Derive the class that diffusers and Espalier use from the class of the model itself."""

    class PrunedDenoiser(code, OwnDenoiser):  # type: ignore[misc, valid-type]
        """The class with the inputs, outputs and config of diffusers."""

        def __init__(self, **settings: Any) -> None:  # noqa: ANN401
            code.__init__(self, **settings)

        @classmethod
        def from_config(  # type: ignore[override]  # diffusers' own annotation is of one class
            cls,
            config: Mapping[str, Any],
            **_kwargs: Any,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            """Build a model of a config: the class with its own keys, then the widths of what was pruned."""
            own = {key: value for key, value in config.items() if not key.startswith("_") and key not in KEYS}
            model = cls(**accepted(code, own))
            pruned = {key: dict(config.get(key) or {}) for key in PRUNED_KEYS}
            more = {key: config.get(key) for key in KEYS} | pruned
            model.register_to_config(**{**own, **more})  # type: ignore[no-untyped-call]
            model.espalier_heads = {name: int(each["heads"]) for name, each in attentions(model).items()}
            narrow(model, pruned["pruned_widths"])
            set_heads(model, pruned["pruned_heads"])
            return model

        def forward(
            self,
            sample: torch.Tensor,
            timestep: torch.Tensor,
            condition: torch.Tensor | None = None,
            *,
            class_labels: torch.Tensor | None = None,
            encoder_hidden_states: torch.Tensor | None = None,
            return_dict: bool = True,
        ) -> Any:  # noqa: ANN401  # as in diffusers
            """Predict as the class does: [B, C, H, W] -> `sample` [B, C, H, W]; one timestep may stand for all."""
            given = next((it for it in (condition, class_labels, encoder_hidden_states) if it is not None), None)
            predicted = predict(super().forward, self.config["description"], sample, timestep, given)
            return UNet2DOutput(sample=predicted) if return_dict else (predicted,)

    PrunedDenoiser.espalier_code = code
    return PrunedDenoiser


def accepted(code: type[nn.Module], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the keys of a config that the constructor gets: all but the sample's, where it does not take these."""
    parameters = inspect.signature(code.__init__).parameters.values()
    names = {each.name for each in parameters}
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    return {key: value for key, value in settings.items() if takes_all or key in names or key not in SAMPLE_KEYS}


def predict(
    run: Callable[..., Any],
    description: Mapping[str, Any],
    sample: torch.Tensor,
    timestep: torch.Tensor,
    condition: torch.Tensor | None,
) -> torch.Tensor:
    """Call a model by the names of its inputs, and return the prediction in its output: [B, C, H, W].

    Raises:
        ValueError: A condition is missing or superfluous, the output has no such part, or the part does not have the
            shape of the sample.
        TypeError: The part is no tensor.
        RuntimeError: forward ends the program, or raises what is no Exception.
    """
    inputs = description["inputs"]
    timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
    arguments = {inputs["sample"]: sample, inputs["timestep"]: timesteps}
    named = [inputs[name] for name in CONDITIONS if inputs.get(name) is not None]
    if condition is None and named:
        raise ValueError(f"forward needs {named[0]}, and no condition is given")
    if condition is not None and not named:
        raise ValueError("a condition is given, and inputs of the description has neither labels nor encoder_states")
    return _find_prediction(_run(run, {**arguments, **dict.fromkeys(named, condition)}), description["output"], sample)


def _find_prediction(found: Any, output: Mapping[str, Any], sample: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return the prediction in what a model returned, as the description's output says: [B, C, H, W].

    Raises:
        ValueError: There is no such part, or it does not have the shape of the sample.
        TypeError: The part is no tensor.
    """
    if output.get("attribute") is not None:
        if not hasattr(found, output["attribute"]):
            raise ValueError(
                f"output.attribute is {output['attribute']}, which the {type(found).__name__} of forward lacks"
            )
        found = getattr(found, output["attribute"])
    if output.get("index") is not None:
        found = found[output["index"]]
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"forward gives a {type(found).__name__}; output.attribute or output.index names its tensor")
    has_more = output.get("channels") is not None and found.ndim == sample.ndim
    prediction: torch.Tensor = found[:, slice(*output["channels"])] if has_more else found
    if prediction.shape != sample.shape:
        taken = f", of which output.channels takes {tuple(prediction.shape)}" if has_more else ""
        raise ValueError(
            f"forward gives {tuple(found.shape)}{taken}, but the noise has the shape of the sample, "
            f"{tuple(sample.shape)}"
        )
    return prediction


def _run(run: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401  # whatever a class returns
    """Run forward.

    Raises:
        RuntimeError: It ends the program, as if that had done its work, or raises what no `except Exception` catches.
    """
    try:
        return run(**arguments)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # classes of exceptions are anyone's, too
        if getattr(error, "is_signal", False):  # the end of the program that runs this
            raise
        raise RuntimeError(f"forward raises {type(error).__name__}: {error}") from None


def attentions(model: ModelMixin) -> dict[str, Mapping[str, Any]]:
    """Find the described attentions with one layer for queries, keys and values: module -> its entry.

    An entry is completed by the names of the layers: `qkv_layer` and `out_layer`.
    """
    return dict(all_attentions(model))


def all_attentions(model: ModelMixin) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find the same as pairs, in which a module occurs as often as it is described."""
    for entry in model.config["description"].get("attention") or ():
        for name, _ in model.named_modules():
            if fnmatchcase(name, entry["qkv"]):
                parent = name.rpartition(".")[0]
                out = f"{parent}.{entry['out']}" if parent else entry["out"]
                yield parent, {**entry, "qkv_layer": name, "out_layer": out}


def narrow(model: nn.Module, widths: Mapping[str, Sequence[int]]) -> None:
    """Replace the parameters of some layers by uninitialized ones of other widths, in place.

    Raises:
        AttributeError: The model has no layer of that name.
    """
    for name, width in widths.items():
        layer = model.get_submodule(name)
        for kind, parameter in list(layer.named_parameters(recurse=False)):
            shape = (*width, *parameter.shape[len(width) :]) if kind == "weight" else (width[0],)
            setattr(layer, kind, nn.Parameter(torch.empty(shape, device=parameter.device, dtype=parameter.dtype)))
    note_widths(model)


def note_widths(model: nn.Module) -> None:
    """Set the width attributes of layers to the shapes of their weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.GroupNorm) and module.weight is not None:
            module.num_channels = module.weight.shape[0]
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape


def set_heads(model: ModelMixin, heads: Mapping[str, int]) -> None:
    """Note how many heads attentions have left, also under the name that their own code has for the number.

    Raises:
        KeyError: The description has no such attention.
    """
    found = attentions(model)
    for name, number in heads.items():
        if attribute := found[name].get("heads_attribute"):
            setattr(model.get_submodule(name), attribute, number)
        model.espalier_heads[name] = number
