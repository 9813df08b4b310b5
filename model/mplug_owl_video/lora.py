"""LoRA on the decoder (arXiv 2106.09685): low-rank updates of the attention's input weights. Only this file uses peft.

A tuned model is published with merged weights, which need no peft, and with its adapter next to them:

    model = PeftModel.from_pretrained(MplugOwlForConditionalGeneration.from_pretrained(base), f"{tuned}/adapter")
"""

from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from model.mplug_owl_video.modeling import MplugOwlForConditionalGeneration

FOLDER = "adapter"
NAME = "default"
"""peft's name of the only adapter."""


def add_lora(decoder: PreTrainedModel, *, rank: int, alpha: int, dropout: float) -> None:
    """Freezes the decoder and adds trainable updates of `rank`, initially zero, scaled by alpha / rank.

    They change the weights that peft lists for the decoder's architecture: `query_key_value` of Bloom, `q_proj` and
    `v_proj` of LLaMA, `c_attn` of GPT-2. Raises ValueError for an architecture that is not listed.
    """
    transposed = any(isinstance(module, Conv1D) for module in decoder.modules())  # layers of GPT-2
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, decoder)


def merged_weights(model: MplugOwlForConditionalGeneration) -> dict[str, Tensor]:
    """The weights of a model by name, with the updates added, as if it never had an adapter."""
    weights = model.state_dict()
    for name, layer in _layers(model).items():
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            tensor = weights.pop(key)
            if key == f"{name}.base_layer.weight":
                update = layer.get_delta_weight(NAME)  # type: ignore[attr-defined]
                tensor = (tensor.float() + update.float()).to(tensor.dtype)
            if ".base_layer." in key:
                weights[key.replace(".base_layer", "")] = tensor
    return weights


def save_adapter(model: MplugOwlForConditionalGeneration, base: str, folder: Path) -> None:
    """Writes the updates to <folder>/adapter, in the format of peft. `base` is where the model was loaded from."""
    layers = _layers(model)
    tensors = {
        f"base_model.model.{name}.{matrix}.weight": getattr(layer, matrix)[NAME].weight.detach().cpu().contiguous()
        for name, layer in layers.items()
        for matrix in ("lora_A", "lora_B")
    }
    config = model.language_model.peft_config[NAME]
    targets = sorted({name.rpartition(".")[2] for name in layers})
    whole = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        # the vision model has layers of the same name
        target_modules=rf"language_model\..*\.({'|'.join(targets)})",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    (folder / FOLDER).mkdir()
    whole.save_pretrained(str(folder / FOLDER))
    save_file(tensors, folder / FOLDER / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _layers(model: MplugOwlForConditionalGeneration) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
