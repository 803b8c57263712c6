"""Copy chunks of a batch on the host to the encoder's device, one ahead of use."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import AS_PASSED, chunk_of, map_tensors, tensors_in
from gradcache_clip.cache.chunks import Chunk


def device_for(parameters: Iterable[Tensor], inputs: Any) -> torch.device | None:
    """Where a batch on the host has to go: the one device of the parameters; None if it may stay.

    A batch that lies on both was placed so: lengths that a layer wants on the host, for one.
    `Shared` tensors do not count: they may be on the device while the batch is on the host.
    """
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or (device := devices.pop()).type == "cpu":
        return None
    tensors = list(tensors_in(inputs, shared=False)) or tensors_in(inputs)
    return device if {tensor.device.type for tensor in tensors} == {"cpu"} else None


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: the allocator keeps a pool of memory for every stream."""
    return torch.cuda.Stream(device)


@dataclass
class _Arriving:
    """A chunk's inputs on the device, complete once the event has passed."""

    chunk: Chunk
    inputs: Any
    event: torch.cuda.Event | None


class HostInputs:
    """Takes chunks out of a batch; with a device, copies the expected one while others compute.

    The batch itself is never copied: a chunk goes through pinned memory, one ahead of its use, on a
    stream of its own.

    Args:
        inputs: the batch of one encoder, nested as it wants it.
        device: where tensors on the host have to go; None leaves everything where it is.
        passed: as for `chunk_of`.
    """

    def __init__(
        self, inputs: Any, device: torch.device | None, passed: Mapping[int, int] = AS_PASSED
    ) -> None:
        self.inputs, self.device, self._passed = inputs, device, passed
        self._arriving: _Arriving | None = None
        on_cuda = device is not None and device.type == "cuda"
        self._stream = _copy_stream(device) if on_cuda else None

    def expect(self, chunk: Chunk) -> None:
        """Start to copy the chunk that will be taken next."""
        if self.device is not None:
            self._arriving = self._started(chunk)

    def take(self, chunk: Chunk) -> Any:
        """Return the rows of a chunk on the device; only the current stream waits for the copy."""
        if self.device is None:
            if type(self.inputs) is Tensor and type(chunk.rows) is slice and chunk.columns is None:
                return self.inputs[chunk.rows]
            return chunk_of(self.inputs, chunk, self._passed)
        arriving, self._arriving = self._arriving, None
        if arriving is None or arriving.chunk is not chunk:
            arriving = self._started(chunk)
        if arriving.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arriving.event)
            for tensor in tensors_in(arriving.inputs):
                if tensor.is_cuda:
                    # The allocator may give its memory away only after this stream is done too.
                    tensor.record_stream(stream)
        return arriving.inputs

    def _started(self, chunk: Chunk) -> _Arriving:
        rows = chunk_of(self.inputs, chunk, self._passed)
        if self._stream is None:
            return _Arriving(chunk, map_tensors(self._on_device, rows), None)
        with torch.cuda.stream(self._stream):
            return _Arriving(chunk, map_tensors(self._on_device, rows), self._stream.record_event())

    def _on_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        if self._stream is not None and tensor.layout is torch.strided and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=self._stream is not None)
