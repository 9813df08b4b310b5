"""Reads checkpoint files lazily and without executing code from them; writes weights shard by shard."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import ConversionError
from model.progress import progress

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
"""Weight files of a folder. Only those of the first pattern that matches are read."""
NOT_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt"}
"""Other files that the trainer of transformers writes next to them."""
FORMATS = {"safetensors": "model", "bin": "pytorch_model"}
"""Formats that can be written, and the names of their files in transformers."""
SHARD_BYTES = 512 * 2**20
"""Size of a shard, which limits the memory needed to write a model."""
WRAPPERS = ("model", "module", "state_dict")
"""Keys under which training programs store the weights, in the order of the original code."""


def open_checkpoint(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, or of all weight files of a folder. They are read from disk on use."""
    if path.is_dir():
        found = (
            sorted(file for file in path.glob(pattern) if file.name not in NOT_WEIGHTS) for pattern in WEIGHT_FILES
        )
        files = next(filter(None, found), None)
        if not files:
            raise ConversionError(f"{path} must hold .safetensors, .bin or .pt files, but it holds none.")
        return {name: tensor for file in files for name, tensor in open_checkpoint(file).items()}
    if not path.is_file():
        raise ConversionError(f"{path} must be a checkpoint file or a folder of them, it does not exist.")
    tree: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    for wrapper in WRAPPERS:
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    if not isinstance(tree, dict) or not tree:
        raise ConversionError(f"{path} must hold named tensors, but it holds a {type(tree).__name__}.")
    others = [str(name) for name, value in tree.items() if not isinstance(value, Tensor)]
    if others:
        raise ConversionError(f"{path} must hold tensors only, {others[0]} is a {type(tree[others[0]]).__name__}.")
    return dict(tree)


def _unpickle(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written by torch before 1.6
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            raise ConversionError(
                f"{path} is an incomplete checkpoint: {' '.join(str(error).split())[:200]}"
            ) from error
        raise ConversionError(
            f"{path} must hold tensors only: loading other objects would execute code from the file. If you trust it, "
            'load it with its own program and save it with torch.save({"module": model.state_dict()}, FILE).'
        ) from error


def write_checkpoint(
    folder: Path,
    forms: Mapping[str, Tensor],
    build: Mapping[str, Callable[[], Tensor]],
    desc: str,
    format: str = "safetensors",
) -> None:
    """Writes one weight file, or shards and an index, in a format of transformers: safetensors or bin.

    `forms` maps each name to a meta tensor of its shape. `build` makes a tensor when it is written.
    """
    stem = FORMATS[format]
    plan = split_state_dict_into_shards_factory(
        dict(forms),
        get_storage_size=lambda form: form.nbytes,
        filename_pattern=f"{stem}{{suffix}}.{format}",
        max_shard_size=SHARD_BYTES,
    )
    bar = progress(plan.filename_to_tensors.items(), total=len(plan.filename_to_tensors), desc=desc, unit="file")
    for filename, names in bar:
        tensors = {name: build[name]().contiguous() for name in names}
        if format == "bin":
            # a view would be saved with the whole file that it is mapped to
            torch.save({name: tensor.clone() for name, tensor in tensors.items()}, folder / filename)
        else:
            save_file(tensors, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.{format}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
