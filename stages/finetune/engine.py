"""Processes, precision and memory layout -> where and how a step is computed, by Hugging Face's accelerate."""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import nn

from stages.finetune.params import EngineParams
from stages.models.families import Denoiser
from stages.runtime.errors import InputError


class Engine:
    """The processes that train together, each with its share of every batch; one alone unless `accelerate launch` says.

    Args:
        params: Precision, compilation, layout.
        device: The kind of device; each process takes one of its own.
    """

    def __init__(self, params: EngineParams, device: torch.device) -> None:
        self.params = params
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if params.precision == "bfloat16" else "no",
            dynamo_plugin=TorchDynamoPlugin(backend="inductor" if params.compile else "no"),
        )
        self.device = self.accelerator.device
        self.num_processes, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process

    @property
    def index(self) -> int:
        """Which of the processes this is."""
        return int(self.accelerator.process_index)

    def lay_out(self, unet: Denoiser) -> None:
        """Bring a model to the device and into the memory layout that was asked for, in place."""
        layout = torch.channels_last if self.params.channels_last else torch.contiguous_format
        nn.Module.to(unet, self.device, memory_format=layout)  # type: ignore[call-overload]

    def wrap(self, unet: Denoiser) -> nn.Module:
        """Give what to call for a training pass: the model, shared among the processes and compiled where asked for."""
        if self.params.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        wrapped: nn.Module = self.accelerator.prepare_model(unet)
        return wrapped

    def share(self, batch_size: int) -> slice:
        """Say which images of a batch this process takes.

        Raises:
            InputError: The batch cannot be shared out evenly.
        """
        parts = self.num_processes * self.params.accumulate
        if batch_size % parts:
            found = f"finetune.batch_size {batch_size} cannot be shared by {self.num_processes} processes"
            raise InputError(f"{found} in {self.params.accumulate} parts each; make it a multiple of {parts}")
        size = batch_size // self.num_processes
        return slice(self.index * size, (self.index + 1) * size)

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the precision that was asked for."""
        context: AbstractContextManager[object] = self.accelerator.autocast()
        return context

    def holding_back(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        """Sum gradients here until the last part of a batch, and only then over the processes."""
        return nullcontext() if is_last else self.accelerator.no_sync(model)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average a number over the processes."""
        if self.num_processes == 1:
            return value
        reduced: torch.Tensor = self.accelerator.reduce(value, reduction="mean")
        return reduced

    def any(self, *, flag: bool) -> bool:
        """Say whether it is so in any of the processes."""
        if self.num_processes == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)
