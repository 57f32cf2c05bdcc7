"""Carries messages between ranks, one flat one per peer, from host memory to host memory.

A `Device` is what differs between CPU and CUDA: four operations, which may run late but run in the
order in which they are called, until `synchronise` has waited for them. On the CPU messages are
exchanged where they lie, and nothing is copied. CUDA was never run here.

What CUDA takes: two buffers on the device, each as large as the host buffer that messages lie in
(2 x 16 MiB as a rule), made before the first exchange and kept; besides, what its context and
NCCL's channels take. Host buffers are pinned by who makes them; torch rounds each up to a power of
two (ATen/core/CachingHostAllocator.h).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist

from reshard.errors import ReshardError, first_line


class DeviceError(ReshardError):
    """A GPU has no room, or has failed."""


class Device(Protocol):
    """What sends and receives; `apart`: it has memory of its own, in which messages have to be."""

    @property
    def name(self) -> str:
        """What its errors call it."""

    @property
    def apart(self) -> bool:
        """Whether messages have to be copied to it."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the device, not initialised."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a message in or out; both stay as they are until `synchronise`."""

    def exchange(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Send `sent`, cut by rank into `sent_bytes`; fill `received` with what ranks sent here."""

    def synchronise(self) -> None:
        """Wait until all is done that was begun."""


class _OverGroup:
    """What is exchanged over the one process group there is, which carries nothing else."""

    def exchange(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Send `sent`, cut by rank into `sent_bytes`; fill `received` with what ranks sent here."""
        dist.all_to_all_single(received, sent, list(received_bytes), list(sent_bytes))


class Host(_OverGroup):
    """The CPU, over Gloo: what is packed is what is sent."""

    name, apart = "cpu", False

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the host."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Nothing, for a message that is where it has to be."""
        if to is not source:
            to.copy_(source)

    def synchronise(self) -> None:
        """Nothing runs late here."""


@dataclass(frozen=True, slots=True)
class Cuda(_OverGroup):
    """A GPU, over NCCL: copies and exchange follow each other on its current stream.

    NCCL's call joins that stream before it returns, or runs on it (pytorch/pytorch#150398), and no
    buffer is freed before the stream was waited for, so that none needs `record_stream`.
    """

    device: torch.device
    apart: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As torch writes it."""
        return str(self.device)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from or to pinned memory, while this thread goes on."""
        to.copy_(source, non_blocking=True)

    def synchronise(self) -> None:
        """Wait for the stream."""
        torch.cuda.current_stream(self.device).synchronize()


class Carrier:
    """Takes messages through a device, by way of two buffers on it that are kept."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._rooms: dict[str, torch.Tensor] = {}

    def lacks_room(self, received: torch.Tensor, sent: torch.Tensor) -> bool:
        """Whether `make_room` has to come before these messages are carried."""
        return self._device.apart and any(
            name not in self._rooms or self._rooms[name].nbytes < _whole(message)
            for name, message in (("received", received), ("sent", sent))
        )

    def make_room(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Make buffers for whatever the host buffers can hold of which these messages are part."""
        self.give_back()
        for name, message in (("received", received), ("sent", sent)):
            size = _whole(message)
            try:
                self._rooms[name] = self._device.empty(size)
            except torch.OutOfMemoryError as error:
                raise DeviceError(
                    f"`{self._device.name}`: no room for two buffers of {size / (1 << 20):g} MiB; "
                    "end what else runs on that GPU, give a smaller engine.memory, or use "
                    "engine.backend=gloo"
                ) from error

    def give_back(self) -> None:
        """Free the buffers on the device."""
        self._rooms.clear()

    def carry(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Exchange one flat message per peer; the host's memory may be used again on return."""
        device = self._device
        there, here = self._beside("received", received), self._beside("sent", sent)
        try:
            device.copy(here, sent)
            device.exchange(there, here, received_bytes, sent_bytes)
            device.copy(received, there)
            device.synchronise()
        except RuntimeError as error:
            # So begins what a call to CUDA says (c10/cuda/CUDAException.h); NCCL tells of peers.
            if not str(error).startswith(("CUDA error", "CUDA out of memory")):
                raise
            raise DeviceError(
                f"`{device.name}` failed ({first_line(error)}); look at `nvidia-smi` and `dmesg` "
                "of its machine, or use engine.backend=gloo"
            ) from error

    def _beside(self, name: str, message: torch.Tensor) -> torch.Tensor:
        """Where the device has a message: in a buffer of its own, or where it lies."""
        return self._rooms[name][: message.numel()] if self._device.apart else message


def _whole(message: torch.Tensor) -> int:
    """The bytes of the buffer that a message is a part of."""
    return message.untyped_storage().nbytes()
