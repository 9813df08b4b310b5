"""`mplug convert` with every kind of source, and with sources that it must reject."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from cli.convert import convert_to
from model import manifest
from model.errors import ConversionError
from model.mplug_video import MPlugVideoForClassification, MPlugVideoForConditionalGeneration, MPlugVideoProcessor
from model.mplug_video.conversion.convert import KEY_BIAS, convert_weights
from model.mplug_video.conversion.names import OPENAI_CLIP, megatron_to_gpt2, piece_dimension
from model.mplug_video.tokenization import encode_sentence, load_tokenizer
from model.mplug_video.vision import TimeSformer
from tests.helpers.upstream import FOLDER, GPT3, Recording, gpt3_folder

CLIP = Recording("clip_convert")
CLIP_STATE = {
    name.removeprefix("in/"): CLIP[name] for name in CLIP.tensors if name.startswith("in/") and name != "in/image"
}


def clip_file(folder: Path, state: dict[str, Tensor] = CLIP_STATE) -> Path:
    torch.save(state, folder / "clip_vit_b16.pth")
    return folder / "clip_vit_b16.pth"


def report(folder: Path) -> dict:
    return json.loads((folder / "conversion.json").read_text(encoding="utf-8"))


def test_a_modelscope_folder_becomes_a_decoder_with_its_tokenizer(tmp_path: Path) -> None:
    convert_weights(GPT3, tmp_path / "decoder")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    recording = Recording("modelscope_tp_split")
    words = recording["full/language_model.embedding.word_embeddings.weight"]
    assert torch.equal(decoder.get_input_embeddings().weight, words)
    assert torch.equal(decoder.lm_head.weight, words)
    assert (decoder.config.n_layer, decoder.config.n_head, decoder.config.layer_norm_epsilon) == (1, 2, 1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "decoder")
    published = load_tokenizer(GPT3 / "tokenizer.json")
    text = "视频标题：小狗在海边\n hello <sep>"
    assert encode_sentence(tokenizer, text, 80) == encode_sentence(published, text, 80)
    assert (decoder.config.bos_token_id, decoder.config.eos_token_id) == (5, 7)
    state = torch.load(GPT3 / "model" / "mp_rank_00_model_states.pt")["module"]
    assert report(tmp_path / "decoder")["mapped"].keys() == state.keys()
    assert manifest.fetch_folder(str(tmp_path / "decoder")) == tmp_path / "decoder"


def test_tensor_parallel_parts_are_joined(tmp_path: Path) -> None:
    recording = Recording("modelscope_tp_split")
    source = gpt3_folder(tmp_path / "pieces", json.loads((GPT3 / "config.json").read_text()))
    (source / "model").mkdir()
    for rank in (0, 1):
        state = {
            n.removeprefix(f"rank{rank}/"): t for n, t in recording.tensors.items() if n.startswith(f"rank{rank}/")
        }
        torch.save({"module": state}, source / "model" / f"mp_rank_0{rank}_model_states.pt")
    convert_weights(source, tmp_path / "joined")
    convert_weights(GPT3, tmp_path / "whole")
    joined, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("joined", "whole"))
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)

    state["language_model.encoder.final_layernorm.bias"] += 1
    torch.save({"module": state}, source / "model" / "mp_rank_01_model_states.pt")
    with pytest.raises(ConversionError, match=r"final_layernorm\.bias must be the same in all 2 parts"):
        convert_weights(source, tmp_path / "odd")


def test_a_converted_timm_vit_matches_upstream(tmp_path: Path) -> None:
    config = CLIP.facts["visual_cfg"]
    conversion = convert_weights(
        clip_file(tmp_path), tmp_path / "clip", vision_heads=config["num_heads"], num_frames=config["num_frames"]
    )
    assert "vision encoder of 2 layers, 2 heads, for 2 frames of 24 pixels" in conversion.summary()
    encoder = TimeSformer.from_pretrained(tmp_path / "clip").eval()
    state = encoder.state_dict()
    names = {"patch_embed.proj.weight": "patch_embed.weight"}
    converted = {n.removeprefix("out/converted/"): t for n, t in CLIP.tensors.items() if n.startswith("out/converted/")}
    assert all(torch.equal(state[names.get(name, name)], tensor) for name, tensor in converted.items())
    fresh = {name.replace("temporal_ln", "temporal_norm") for name in CLIP.facts["missing"]}
    assert set(conversion.initialised) == fresh == state.keys() - {names.get(name, name) for name in converted}
    heads, biases = ("head.weight", "head.bias"), (f"blocks.{n}.attn.qkv.bias (keys)" for n in range(2))
    assert conversion.dropped == {**dict.fromkeys(heads, "a classifier of images"), **dict.fromkeys(biases, KEY_BIAS)}
    zero = [name for name in fresh if "temporal_fc" in name or name == "temporal_embed"]
    assert not any(state[name].any() for name in zero)
    with torch.no_grad():
        tokens = encoder(CLIP["in/image"])
    torch.testing.assert_close(tokens, CLIP["out/tokens"], rtol=1e-5, atol=1e-5)


def test_a_converted_transformers_clip_matches_on_one_frame(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    clip = CLIPVisionModel(config).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    clip.save_pretrained(tmp_path / "hf")
    state = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in clip.state_dict().items()}
    save_file({**state, "logit_scale": torch.ones(())}, tmp_path / "hf" / "model.safetensors")
    conversion = convert_weights(tmp_path / "hf", tmp_path / "converted", vision_heads=4, num_frames=1)
    assert "logit_scale" in conversion.dropped
    encoder = TimeSformer.from_pretrained(tmp_path / "converted").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = clip(pixels).last_hidden_state
        expected = torch.nn.functional.layer_norm(
            states, (32,), state["vision_model.post_layernorm.weight"], state["vision_model.post_layernorm.bias"], 1e-6
        )
        torch.testing.assert_close(encoder(pixels[:, :, None]), expected, rtol=1e-4, atol=1e-4)


def test_openai_names_map_to_the_same_tensors(tmp_path: Path) -> None:
    openai = {}
    for name, tensor in CLIP_STATE.items():
        for theirs, timm in OPENAI_CLIP.items():
            for layer in range(2):
                if name == timm.format(layer) or name.rpartition(".")[0] == timm.format(layer):
                    leaf = "" if name == timm.format(layer) else f".{name.rpartition('.')[2]}"
                    openai[theirs.format(layer) + leaf] = tensor
    openai["visual.class_embedding"] = openai["visual.class_embedding"].flatten()
    openai["visual.positional_embedding"] = openai["visual.positional_embedding"][0]
    openai["token_embedding.weight"] = torch.zeros(3, 3)
    convert_weights(clip_file(tmp_path, openai), tmp_path / "openai", vision_heads=2)
    convert_weights(clip_file(tmp_path), tmp_path / "timm", vision_heads=2)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("openai", "timm"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_real_deepspeed_checkpoint_is_converted_to_another_size(dtype: torch.dtype, tmp_path: Path) -> None:
    recording = Recording("deepspeed_resume")
    decoder = gpt3_folder(tmp_path / "gpt3", recording.facts["text_cfg"])
    source = tmp_path / "mp_rank_00_model_states.pt"
    shutil.copy(FOLDER / "deepspeed_mp_rank_00_model_states.pt", source)
    if dtype == torch.float32:
        state = torch.load(source, weights_only=True)["module"]
        torch.save({"module": {name: tensor.float() for name, tensor in state.items()}}, source)
    size = {"image_size": recording.facts["new_img_size"], "num_frames": recording.facts["new_num_frames"]}
    heads = recording.facts["visual_cfg"]["num_heads"]
    convert_weights(source, tmp_path / "converted", decoder=decoder, vision_heads=heads, **size)
    model = MPlugVideoForConditionalGeneration.from_pretrained(tmp_path / "converted")
    assert model.dtype == dtype
    found, names = model.state_dict(), report(tmp_path / "converted")["mapped"]
    for part in ("pos_embed", "temporal_embed"):
        torch.testing.assert_close(
            found[f"vision_encoder.{part}"].float(), recording[f"out/{str(dtype)[6:]}/{part}"], rtol=1e-6, atol=1e-7
        )
    for name, ours in names.items():
        if dtype == torch.bfloat16:
            expected = recording[f"out/loaded/{name}"]
            if ".query_key_value." in name or name.endswith(("dense.weight", "_4h.weight", "_h.weight")):
                expected = megatron_to_gpt2(ours, expected, recording.facts["text_cfg"]["num_attention_heads"])
            assert torch.equal(found[ours].float(), expected), name
    processor = MPlugVideoProcessor.from_pretrained(tmp_path / "converted")
    assert {"image_size": processor.image_size, "num_frames": processor.num_frames} == size
    assert processor.resample == "nearest"


def test_tensor_parallel_and_single_checkpoints_convert_equally(tmp_path: Path) -> None:
    recording = Recording("pretrain")
    whole = recording.convert(tmp_path / "whole")
    state = torch.load(tmp_path / "whole" / "mp_rank_00_model_states.pt")["module"]
    pieces = tmp_path / "checkpoint-3"
    pieces.mkdir()
    for rank in (0, 1):
        cut = {
            name: tensor if (dim := piece_dimension(name)) is None else tensor.chunk(2, dim)[rank].clone()
            for name, tensor in state.items()
        }
        torch.save({"module": cut}, pieces / f"mp_rank_0{rank}_model_states.pt")
    heads = recording.facts["visual_cfg"]["num_heads"]
    convert_weights(pieces, tmp_path / "joined", decoder=tmp_path / "whole" / "gpt3", vision_heads=heads)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "joined"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_large_model_is_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Recording("pretrain").convert(tmp_path / "whole")
    monkeypatch.setattr("model.weight_files.SHARD_BYTES", 50_000)
    sharded = Recording("pretrain").convert(tmp_path / "sharded")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    first, second = (MPlugVideoForConditionalGeneration.from_pretrained(folder) for folder in (whole, sharded))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_model_is_written_to_object_storage_completely(s3: str, tmp_path: Path) -> None:
    dest = f"{s3}/converted/clip"
    convert_to(clip_file(tmp_path), dest, {"vision_heads": 2})
    assert TimeSformer.from_pretrained(manifest.fetch_folder(dest)).config.num_hidden_layers == 2
    with pytest.raises(ConversionError, match="must not exist"):
        convert_to(clip_file(tmp_path), dest, {"vision_heads": 2})


def test_class_names_must_match_the_head(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"the head has 5 classes, but none were given"):
        Recording("cls").convert(tmp_path / "none")
    folder = Recording("cls").convert(tmp_path / "five", class_names=list("abcde"))
    assert MPlugVideoForClassification.from_pretrained(folder).config.class_names == list("abcde")


def test_all_problems_are_reported_and_nothing_is_written(tmp_path: Path) -> None:
    state = dict(CLIP_STATE)
    del state["norm.weight"]
    state["blocks.1.ls1.gamma"] = torch.ones(16)
    state["norm_pre.bias"] = torch.zeros(3)
    with pytest.raises(ConversionError) as caught:
        convert_weights(clip_file(tmp_path, state), tmp_path / "out", vision_heads=2)
    assert str(caught.value).splitlines() == [
        "norm.weight is missing in the source.",
        "norm_pre.bias must be (16,) as norm_pre.bias, but it is (3,).",
        "blocks.1.ls1.gamma is not known. Leave it out with --drop blocks.1.ls1.gamma.",
    ]
    assert not (tmp_path / "out").exists()
    state = {**CLIP_STATE, "blocks.1.ls1.gamma": torch.ones(16)}
    conversion = convert_weights(clip_file(tmp_path, state), tmp_path / "out", vision_heads=2, drop=["*.ls1.*"])
    assert conversion.dropped["blocks.1.ls1.gamma"] == "asked for (--drop)"
    with pytest.raises(ConversionError, match="must not exist"):
        convert_weights(clip_file(tmp_path), tmp_path / "out", vision_heads=2)


def test_a_pickle_with_other_objects_is_rejected(tmp_path: Path) -> None:
    torch.save({"model": CLIP_STATE, "args": argparse.Namespace(lr=1)}, tmp_path / "checkpoint-9.pth")
    with pytest.raises(ConversionError, match=r"would execute code from the file.*torch\.save\({\"module\""):
        convert_weights(tmp_path / "checkpoint-9.pth", tmp_path / "out")
    (tmp_path / "cut.pt").write_bytes(clip_file(tmp_path).read_bytes()[:5000])
    with pytest.raises(ConversionError, match="is an incomplete checkpoint"):
        convert_weights(tmp_path / "cut.pt", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"needs the folder of its GPT-3 too.*--decoder"):
        convert_weights(FOLDER / "deepspeed_mp_rank_00_model_states.pt", tmp_path / "out")
    with pytest.raises(ConversionError, match="a multiple of the patch size 8, but it is 30"):
        convert_weights(clip_file(tmp_path), tmp_path / "out", vision_heads=2, image_size=30)
    with pytest.raises(ConversionError, match="it does not exist"):
        convert_weights(tmp_path / "absent.pt", tmp_path / "out")
