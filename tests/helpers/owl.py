"""Recorded runs of mPLUG-Owl's video code: `OwlRecording("bloom_generate")` has weights, inputs and outputs.

`repaired` outputs are those of its modules in the order of its `generate`: its training path cannot read videos.
"""

import json
from pathlib import Path

from torch import Tensor

from model.mplug_owl_video import MplugOwlConfig, MplugOwlForConditionalGeneration
from tests.helpers.paths import FIXTURES
from tests.helpers.recorded import Recorded

OWL = FIXTURES / "mplug_owl_video"
CHECKPOINT = OWL / "hf_checkpoint"
CLIP = OWL / "sample.mp4"


class OwlRecording(Recorded):
    """A recorded case of the BloomZ family."""

    recordings = OWL

    def model(self) -> MplugOwlForConditionalGeneration:
        model = MplugOwlForConditionalGeneration(MplugOwlConfig(**self.facts["config"]))
        missing, unexpected = model.load_state_dict(self.state(), strict=False)
        assert set(missing) <= {"language_model.lm_head.weight"}  # tied to the word embeddings
        assert all(name.endswith("rotary_emb.inv_freq") for name in unexpected)
        return model.eval()

    def media(self, images: int, videos: int) -> dict[str, Tensor]:
        """The first images and videos of the recording."""
        pools = {"pixel_values": images, "video_pixel_values": videos}
        return {name: self[f"in/pool/{name}"][:number] for name, number in pools.items() if number}


def prompts() -> dict[str, str]:
    facts: dict[str, str] = json.loads((OWL / "processor.json").read_text(encoding="utf-8"))["prompts"]
    return facts


def published(folder: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
