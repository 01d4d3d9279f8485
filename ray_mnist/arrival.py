"""What a GPU computes, brought to the CPU without waiting for it: a wait would have the GPU run out of work."""

import torch
from torch import Tensor


class Arrival:
    """A copy of a tensor on the CPU, once it is there.

    Args:
        tensor: of any shape and type; from a device other than a GPU or the CPU it is waited for here.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def is_here(self) -> bool:
        """Whether `values` need not wait."""
        return self._copied is None or bool(self._copied.query())

    def values(self) -> Tensor:
        """The copy; waits for it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
