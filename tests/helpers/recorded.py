"""A recorded run of original code: facts in JSON, tensors in safetensors."""

import json
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file
from torch import Tensor


class Recorded:
    """One recorded case, with tiny random weights. All numbers are from the original code in float32."""

    recordings: ClassVar[Path]

    def __init__(self, name: str) -> None:
        self.name = name
        self.facts = json.loads((self.recordings / f"{name}.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.recordings / f"{self.name}.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def state(self) -> dict[str, Tensor]:
        """The recorded weights."""
        return {name.removeprefix("state/"): value for name, value in self.tensors.items() if name.startswith("state/")}
