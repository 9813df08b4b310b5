"""Peak memory and time of loading a synthetic mPLUG-Video (BloomZ-7B) in bf16, from both formats of weight files.

    python -m benchmarks.loading                     # writes and reads 15 GB below the temporary folder, twice

Writes benchmarks/results/loading.json. The peak is that of the process, including the program and mapped pages of the
files.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig

from model import weight_files
from model.config.load import load_config
from model.mplug_owl_video import MplugOwlConfig, MplugOwlForConditionalGeneration

RESULTS = Path(__file__).parent / "results"
SHARD_BYTES = 5 * 10**9
LOAD = """
import json, resource, sys, time, torch
from model.mplug_owl_video import MplugOwlForConditionalGeneration
start = time.perf_counter()
model = MplugOwlForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
seconds = time.perf_counter() - start
means = [float(weights.mean(dtype=torch.float32)) for weights in model.parameters()]  # reads every page
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "means": [min(means), max(means)]}))
"""


def synthetic_model(folder: Path, format: str) -> None:
    """Writes configuration and random weights of the published size."""
    preset = load_config("instruction_bloomz_7b", ["model.init_from=m", "data.shards=s"]).model
    text = dict(preset.text)
    config = MplugOwlConfig(text_config=AutoConfig.for_model(text.pop("model_type"), **text))
    config.save_pretrained(folder)
    with torch.device("meta"):
        forms = dict(MplugOwlForConditionalGeneration(config).to(torch.bfloat16).named_parameters())
    build = {name: lambda form=form: torch.rand(form.shape, dtype=form.dtype) for name, form in forms.items()}
    weight_files.SHARD_BYTES = SHARD_BYTES
    weight_files.write_checkpoint(folder, forms, build, f"writing {format}", format)


def measured(format: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        # in a separate process, so that its memory does not count
        subprocess.run([sys.executable, "-m", "benchmarks.loading", "--write", folder, format], check=True)
        size = sum(file.stat().st_size for file in Path(folder).glob(f"*.{format}"))
        ran = subprocess.run([sys.executable, "-c", LOAD, folder], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(ran.stdout)
    return {"checkpoint_bytes": size, **found, "peak_over_checkpoint": found["peak_bytes"] / size}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        synthetic_model(Path(arguments.write[0]), arguments.write[1])
    else:
        results = {format: measured(format) for format in weight_files.FORMATS}
        print(json.dumps(results, indent=1))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "loading.json").write_text(json.dumps(results, indent=1) + "\n")
