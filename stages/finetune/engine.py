"""Processes, precision and memory layout of a training, by Hugging Face's accelerate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin, broadcast
from torch import nn

from stages.finetune.params import EngineParams
from stages.models.channels_last import to_channels_last
from stages.models.families import Denoiser, example_inputs, family_name, forward, skeleton
from stages.runtime.device import computing, naming_switch
from stages.runtime.errors import InputError
from stages.runtime.processes import Processes

BATCH_SIZE = "finetune.batch_size"
DETERMINISTIC = "finetune.engine.deterministic"
TIMEOUT = timedelta(hours=6)
"""Longest time that processes wait for one that hashes the images, downloads a checkpoint or draws samples."""


def check_parts(num_images: int, processes: int, accumulate: int, key: str = BATCH_SIZE) -> None:
    """Check that the images of a step divide into the parts of each process; `key` of params.yaml is their number.

    Raises:
        InputError: They do not.
    """
    if num_images % (processes * accumulate):
        found = f"{key} {num_images} does not divide by {processes} processes of {accumulate} parts each"
        raise InputError(f"{found}; make it a multiple of {processes * accumulate}")


def freeze_unused(unet: Denoiser) -> None:
    """Exclude parameters that take no part in forward from training, in place.

    They have no gradient anyway, and DistributedDataParallel would wait for it.
    """
    copy = skeleton(unet)
    forward(copy, example_inputs(copy)).sum().backward()
    for parameter, copied in zip(unet.parameters(), copy.parameters(), strict=True):
        parameter.requires_grad_(copied.grad is not None)


class DelayedNumber:
    """Reads a number from a GPU one call later, when the GPU has long computed it; from a CPU at once."""

    def __init__(self) -> None:
        self.copied: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def exchange(self, value: torch.Tensor) -> int:
        """Start to read `value` [], and return the one before; 0 at the first call on a GPU."""
        if value.device.type != "cuda":
            return int(value)
        before, event = self.copied, torch.cuda.Event()
        self.copied = value.to("cpu", non_blocking=True), event
        event.record()
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


class Engine:
    """This process among those that train together; it is the only one unless a launcher started several.

    Args:
        params: Precision, compilation, layout.
        device: CPU or GPU; with GPUs each process uses its own.
    """

    def __init__(self, params: EngineParams, device: torch.device) -> None:
        self.params = params
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if params.precision == "bfloat16" else "no",
            dynamo_plugin=TorchDynamoPlugin(backend="inductor" if params.compile else "no"),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        self.device, self.index = self.accelerator.device, self.accelerator.process_index
        self.num_processes, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        self._largest = DelayedNumber()

    def place(self, unet: Denoiser) -> None:
        """Move a model to the device and into the memory layout of `params`, in place."""
        nn.Module.to(unet, self.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if self.params.channels_last:
            to_channels_last(unet)

    def wrap(self, unet: Denoiser) -> nn.Module:
        """Return the module to call in training: distributed over the processes and compiled as `params` say."""
        if self.params.gradient_checkpointing:
            if not unet._supports_gradient_checkpointing:  # noqa: SLF001  # diffusers has no public name for it
                found = f"finetune.engine.gradient_checkpointing is true, and the code of {family_name(unet)} has none"
                raise InputError(f"{found}; set it to false")
            unet.enable_gradient_checkpointing()
        if self.num_processes > 1:
            freeze_unused(unet)
        wrapped: nn.Module = self.accelerator.prepare_model(unet)
        return wrapped

    def local_rows(self, num_images: int, key: str = BATCH_SIZE) -> slice:
        """Return which of the images of a step this process computes; `key` of params.yaml is their number.

        Raises:
            InputError: They do not divide evenly.
        """
        check_parts(num_images, self.num_processes, self.params.accumulate, key)
        size = num_images // self.num_processes
        return slice(self.index * size, (self.index + 1) * size)

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context that computes a forward pass in bfloat16 if `params` say so; `accumulating` sees to tf32."""
        context: AbstractContextManager[object] = self.accelerator.autocast()
        return context

    @contextmanager
    def accumulating(self, model: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Compute one part of a batch, with its backward pass; gradients are summed over processes after the last part.

        Raises:
            InputError: The model has an operation without a deterministic kernel, and `params` allow no other.
        """
        apart = nullcontext() if is_last else self.accelerator.no_sync(model)
        with computing(self.params.precision), naming_switch(DETERMINISTIC), apart:
            yield

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average a tensor over the processes."""
        if self.num_processes == 1:
            return value
        reduced: torch.Tensor = self.accelerator.reduce(value, reduction="mean")
        return reduced

    def of_main(self, numbers: Sequence[float]) -> list[float]:
        """Return the numbers of the main process in all, so that what they decide is decided alike."""
        if self.num_processes == 1:
            return list(numbers)
        shared: torch.Tensor = broadcast(torch.tensor(numbers, dtype=torch.float64, device=self.device))
        return [float(number) for number in shared.tolist()]

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers; on GPUs those of the call before, which need no waiting."""
        if self.num_processes == 1:
            return number
        numbers: torch.Tensor = self.accelerator.gather(torch.full((1,), number, device=self.device))
        return self._largest.exchange(numbers.max())

    def check_equal(self, steps_done: int) -> None:
        """Check that all processes go on from the same step: each machine reads the checkpoints of its own disk.

        Raises:
            InputError: They do not.
        """
        if self.num_processes == 1:
            return
        found = self.accelerator.gather(torch.full((1,), steps_done, device=self.device)).tolist()
        if len(set(found)) > 1:
            steps = f"the processes go on from the steps {', '.join(map(str, found))}"
            raise InputError(f"{steps}; give all machines one folder of checkpoints, or remove those of this training")

    def share_sha256(self, compute: Callable[[], str]) -> str:
        """Return the SHA-256, in hexadecimal, that `compute` returns in the main process; no other one calls it."""
        group = torch.distributed.group.WORLD if self.num_processes > 1 else None
        return Processes(self.device, group).share_sha256(compute)

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.accelerator.wait_for_everyone()
