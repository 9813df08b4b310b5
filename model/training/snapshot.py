"""A copy of tensors in the safetensors format, in memory that is allocated once."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LENGTH_BYTES, ALIGNMENT = 8, 8


class Snapshot:
    """For fp32 tensors with fixed names and sizes. Copying does not allocate, and writing does not copy again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        start = LENGTH_BYTES + len(text)
        self.on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self.buffer = torch.empty(start + end, dtype=torch.uint8, pin_memory=self.on_gpu)
        self.buffer[:start] = torch.frombuffer(
            bytearray(len(text).to_bytes(LENGTH_BYTES, "little") + text), dtype=torch.uint8
        )
        values = torch.split(self.buffer[start:].view(torch.float32), [tensor.numel() for tensor in tensors.values()])
        self.views = dict(zip(tensors, values, strict=True))

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the current values."""
        for name, tensor in tensors.items():
            self.views[name].copy_(tensor.view(-1), non_blocking=True)
        if self.on_gpu:
            torch.cuda.synchronize()

    @property
    def file(self) -> memoryview:
        """The bytes of the file. The next `copy` overwrites them."""
        return self.buffer.numpy().data
