"""Recorded runs of the original code: `Recording("cls")` has inputs and outputs, and converts the weights."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.mplug_video.conversion.convert import convert_weights
from tests.helpers.paths import FIXTURES
from tests.helpers.recorded import Recorded

FOLDER = FIXTURES / "upstream"
GPT3 = FOLDER / "modelscope_gpt3"


class Recording(Recorded):
    """A recorded case of the GPT-3 family."""

    recordings = FOLDER

    def convert(self, folder: Path, **options: object) -> Path:
        """Writes the recorded weights in their published format and converts them."""
        decoder = gpt3_folder(folder / "gpt3", self.facts["text_cfg"])
        torch.save({"module": self.state()}, folder / "mp_rank_00_model_states.pt")
        heads = self.facts["visual_cfg"]["num_heads"]
        convert_weights(
            folder / "mp_rank_00_model_states.pt", folder / "converted", decoder=decoder, vision_heads=heads, **options
        )
        return folder / "converted"

    def load(self, kind: type[PreTrainedModel], folder: Path, **options: object) -> PreTrainedModel:
        converted = self.convert(folder, **options)
        return kind.from_pretrained(converted, dtype=torch.float32).eval()


def gpt3_folder(folder: Path, config: dict[str, object]) -> Path:
    """Files of the ModelScope folder other than the weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((GPT3 / "tokenizer.json").read_bytes())
    return folder


def mapped_names(folder: Path) -> dict[str, str]:
    """The recorded names of parameters -> ours."""
    names: dict[str, str] = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["mapped"]
    return names


def grad_norms(model: PreTrainedModel, names: list[str], folder: Path) -> Tensor:
    """Gradient norms in the order of recorded names, -1 where no gradient arrived."""
    ours, parameters = mapped_names(folder), dict(model.named_parameters())
    grads = [parameters[ours[name]].grad for name in names]
    return torch.stack([torch.tensor(-1.0) if grad is None else grad.norm() for grad in grads])
