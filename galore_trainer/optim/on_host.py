"""Numbers of a device that the host wants to know, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnHost:
    """Numbers on their way to the host, behind nothing that the device is asked for later."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._there = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.current_stream(numbers.device).record_event()

    @property
    def waits(self) -> bool:
        """Whether a device may have to be waited for."""
        return self._there is not None

    @property
    def there(self) -> bool:
        """Whether nothing has to be waited for."""
        return self._there is None or bool(self._there.query())

    def tolist(self) -> list[Any]:
        """Wait until they are there."""
        if self._there is not None:
            self._there.synchronize()
        found: list[Any] = self._numbers.tolist()
        return found
