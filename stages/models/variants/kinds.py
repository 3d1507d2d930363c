"""Names such as int8 or cache-3 -> what a variant of a model consists of; knows which parts exclude each other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.models.params import CALL_TWICE, SamplerParams
from stages.runtime.errors import InputError

Form = Literal["float32", "int8", "int4", "float8", "onnx", "int8-dynamic"]
"""What holds the weights: safetensors of that type, or an ONNX graph in float32 or with integer products."""

INTEGERS = {"int8": 8, "int4": 4}
"""Form with integer weights -> bits of each."""
FLOAT8: Literal["float8"] = "float8"
"""Form with weights of 8 bits that are floats, e4m3."""
ROUNDED = (*INTEGERS, FLOAT8)
"""Forms whose weights are rounded, and become float32 as they are read."""
GRAPHS = ("onnx", "int8-dynamic")
"""Forms that ONNX Runtime runs."""
LONGEST_OF_TWICE = 2
"""Interval of the longest cache of a sampler that repeats timesteps, at which a pass is full."""
CACHE = re.compile(r"cache-(\d+)")
NAMES = (*ROUNDED, *GRAPHS, "cache-N")
REFUSED = {
    "torch-export": "torch.export.save puts a pickle of the example inputs into its file; use onnx",
}
"""Names that one could expect -> why there is no such part."""


@dataclass(frozen=True)
class Kind:
    """What a variant consists of."""

    form: Form = "float32"
    interval: int = 1
    """Sampling steps from one full pass to the next; 1 reuses nothing."""

    @property
    def name(self) -> str:
        """The parts, joined by plus signs."""
        parts = [self.form] if self.form != "float32" else []
        return "+".join([*parts, *([f"cache-{self.interval}"] if self.interval > 1 else [])])

    @property
    def title(self) -> str:
        """The name as tables write it, such as int8 + cache-2."""
        return self.name.replace("+", " + ")

    @property
    def is_graph(self) -> bool:
        """Whether ONNX Runtime runs it."""
        return self.form in GRAPHS


def parse_kind(parts: str | Sequence[str]) -> Kind:
    """Combine the parts of a variant, such as int8, or int8 and cache-3.

    Raises:
        ValueError: A part is unknown, or the parts exclude each other; the message says what is allowed.
    """
    names = [parts] if isinstance(parts, str) else list(parts)
    forms = [name for name in names if name in (*ROUNDED, *GRAPHS)]
    intervals = [int(found[1]) for name in names if (found := CACHE.fullmatch(name))]
    for name in names:
        if name not in forms and not CACHE.fullmatch(name):
            reason = REFUSED.get(name, f"allowed: {', '.join(NAMES)}")
            raise ValueError(f"{name!r} is not a kind of variant; {reason}")
    if not names or len(forms) > 1 or len(intervals) > 1:
        allowed = "combine at most one of each: int8, int4 or float8; cache-N"
        raise ValueError(f"[{', '.join(names)}] is not one variant; {allowed}")
    if intervals and intervals[0] < 2:  # noqa: PLR2004
        raise ValueError(f"cache-{intervals[0]} reuses nothing; N is the steps between full passes, 2 or more")
    kind = Kind(forms[0] if forms else "float32", intervals[0] if intervals else 1)  # type: ignore[arg-type]
    if kind.is_graph and kind.interval > 1:
        allowed = "combine cache-N with int8, int4 or float8"
        raise ValueError(f"[{', '.join(names)}]: an ONNX graph is one whole pass; {allowed}")
    return kind


def check_cache_sampler(interval: int, sampler: SamplerParams, found: str) -> None:
    """Check that a cache draws with a sampler as its interval says.

    Args:
        interval: Sampling steps from one full pass to the next; 1 reuses nothing.
        sampler: The sampler of the protocol.
        found: Where which cache was found, with which the message begins.

    Raises:
        InputError: The cache has no second full pass, or would be another cache.
    """
    if interval > sampler.steps:
        found = f"{found}, and reference.sampler.steps is {sampler.steps}: one full pass would serve the whole image"
        raise InputError(f"{found}; choose at most cache-{sampler.steps}, or more steps")
    if interval > LONGEST_OF_TWICE and sampler.scheduler in CALL_TWICE:
        found = f"{found}, and {sampler.scheduler} calls the model twice at some timesteps, the second time in full"
        raise InputError(f"{found}; choose cache-{LONGEST_OF_TWICE}, or another sampler")
