"""Peak memory and time of `mplug convert` on a synthetic checkpoint of a published size, in bf16.

    python -m benchmarks.conversion                     # 2.7B: writes and reads 5.6 GB below the temporary folder
    python -m benchmarks.conversion --preset pretrain_1.3b

Writes benchmarks/results/conversion.json. The peak is that of the process, including the program and mapped pages of
the checkpoint.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from model.config.load import load_config
from model.mplug_video import MPlugVideoConfig, MPlugVideoForConditionalGeneration
from model.mplug_video.configuration import TimeSformerConfig
from model.mplug_video.conversion.names import BRIDGE_AND_HEADS, DECODER, VISION, translate
from model.mplug_video.tokenization import train_bpe_tokenizer

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "decoder.": ("text_decoder.dist_model.language_model.", DECODER),
    "vision_encoder.": ("visual_encoder.", VISION),
    "": ("", BRIDGE_AND_HEADS),
}
"""Prefix here -> published prefix, and the table of names below it."""
CONVERT = """
import resource, sys
from cli.main import app
app(sys.argv[1:], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def synthetic_checkpoint(preset: str, folder: Path) -> None:
    """Writes the published files of a size with random weights: checkpoint, and GPT-3 folder without weights."""
    settings = load_config(preset, ["model.decoder=d", "data.shards=s"]).model
    text = dict(settings.text)
    config = MPlugVideoConfig(
        vision_config=TimeSformerConfig(**settings.vision.model_dump()),
        text_config=AutoConfig.for_model(text.pop("model_type"), **text),
    )
    with torch.device("meta"):
        model = MPlugVideoForConditionalGeneration(config)
    state = {}
    for name, form in model.named_parameters():
        shape = tuple(form.shape)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            shape = shape[::-1]
        state[published_name(name)] = torch.rand(shape, dtype=torch.bfloat16)
    torch.save({"module": state}, folder / "mp_rank_00_model_states.pt")
    (folder / "gpt3").mkdir()
    train_bpe_tokenizer(["小猫"], vocab_size=300).save_pretrained(folder / "gpt3")
    (folder / "gpt3" / "config.json").write_text(json.dumps({"num_attention_heads": settings.text["n_head"]}))


def published_name(name: str) -> str:
    for ours, (theirs, table) in PARTS.items():
        if name.startswith(ours):
            inverse = {value: key for key, value in table.items()}
            rest = name.removeprefix(ours)
            return theirs + (translate(rest, inverse) or rest)
    raise AssertionError(name)


def main(preset: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # in a separate process, so that its memory does not count
        subprocess.run(
            [sys.executable, "-m", "benchmarks.conversion", "--write", str(folder), "--preset", preset], check=True
        )
        source = folder / "mp_rank_00_model_states.pt"
        command = ["convert", str(source), str(folder / "converted"), "--decoder", str(folder / "gpt3")]
        start = time.perf_counter()
        ran = subprocess.run([sys.executable, "-c", CONVERT, *command], check=True, stdout=subprocess.PIPE, text=True)
        seconds, size = time.perf_counter() - start, source.stat().st_size
    peak = int(ran.stdout.split()[-1])
    found = {
        "preset": preset,
        "checkpoint_bytes": size,
        "peak_bytes": peak,
        "peak_over_checkpoint": peak / size,
        "seconds": seconds,
    }
    print(json.dumps(found, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "conversion.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pretrain_2.7b")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        synthetic_checkpoint(arguments.preset, Path(arguments.write))
    else:
        main(arguments.preset)
