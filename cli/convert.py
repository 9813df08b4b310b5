"""`mplug convert`: finds out what a source is, and writes a folder or an s3:// URI."""

import tempfile
from pathlib import Path
from typing import Any

from model import manifest, storage
from model.conversion import Conversion
from model.errors import ConfigError, ConversionError
from model.mplug_owl_video.conversion import convert_mplug_owl, is_mplug_owl
from model.mplug_video.conversion.convert import convert_weights
from model.weight_files import open_checkpoint

MPLUG_VIDEO = {"decoder", "vision_heads", "image_size", "num_frames", "class_names", "drop"}
MPLUG_OWL = {"base", "lora_alpha", "format", "drop"}
"""Options of each family."""


def convert_to(source: Path, dest: str, options: dict[str, Any]) -> Conversion:
    """Converts `source` to a folder or an s3:// URI. Options that are None were not given."""
    if not storage.is_s3(dest):
        return _convert(source, Path(dest), options)
    if storage.exists(storage.join(dest, manifest.FILE)):
        raise ConversionError(f"{dest} must not exist, a conversion writes all of it. Choose another.")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "converted"
        conversion = _convert(source, local, options)
        manifest.upload_folder(local, dest, (local / manifest.FILE).read_bytes())
    return conversion


def _convert(source: Path, dest: Path, options: dict[str, Any]) -> Conversion:
    given = {name: value for name, value in options.items() if value is not None}
    is_owl = _is_mplug_owl(source)
    known, convert = (MPLUG_OWL, convert_mplug_owl) if is_owl else (MPLUG_VIDEO, convert_weights)
    if wrong := sorted(given.keys() - known):
        kind = "an mPLUG-Owl" if is_owl else "not an mPLUG-Owl"
        raise ConfigError(f"--{wrong[0].replace('_', '-')} must be left out: {source} is {kind}.")
    return convert(source, dest, **given)


def _is_mplug_owl(source: Path) -> bool:
    try:
        return is_mplug_owl(open_checkpoint(source))
    except ConversionError:  # tensor-parallel parts of a GPT-3, or nothing that can be converted
        return False
