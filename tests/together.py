"""Several processes of a stage as threads of one process, which exchange tensors through PyTorch's own Gloo."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from torch.distributed import HashStore, ProcessGroupGloo

from stages.runtime.processes import Processes

TIMEOUT = timedelta(seconds=60)


def run_together(count, work, device="cpu"):
    """Return what `work` returns for each of `count` processes, which share a device, in their order."""
    store = HashStore()

    def run(index):
        group = ProcessGroupGloo(store, index, count, TIMEOUT) if count > 1 else None
        return work(Processes(torch.device(device), group))

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))
