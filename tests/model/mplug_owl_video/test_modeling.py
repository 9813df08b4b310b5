"""Media in any arrangement, batches, precision, and files of weights."""

import json
import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.mplug_owl_video import (
    MplugOwlConfig,
    MplugOwlForConditionalGeneration,
    MplugOwlImageProcessor,
    MplugOwlProcessor,
)
from tests.helpers.owl import CHECKPOINT, CLIP, OwlRecording, prompts, published

FAMILIES = [OwlRecording("bloom_generate"), OwlRecording("llama_generate")]
VIDEO, IMAGE = [-2] * 9, [-1] * 9


def load(folder: Path = CHECKPOINT, **options: object) -> MplugOwlForConditionalGeneration:
    return MplugOwlForConditionalGeneration.from_pretrained(folder, **{"dtype": torch.float32, **options})


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda recording: recording.name)
def recording(request: pytest.FixtureRequest) -> OwlRecording:
    found: OwlRecording = request.param
    return found


@pytest.fixture(scope="module")
def model(recording: OwlRecording) -> MplugOwlForConditionalGeneration:
    return recording.model()


@torch.no_grad()
def test_media_are_placed_in_reading_order(model: MplugOwlForConditionalGeneration, recording: OwlRecording) -> None:
    """Adjacent videos too, which the original code merges."""
    ids = torch.tensor([[1, 7, *VIDEO, *VIDEO, 8], [1, *IMAGE, 9, *VIDEO, 8]])
    pixels = recording.media(1, 2)
    clips = torch.cat((pixels["video_pixel_values"], pixels["video_pixel_values"][:1].flip(2)))
    embeddings = model.embed(ids, pixels["pixel_values"], clips)
    vectors, picture = model.encode_media(clips), model.encode_media(pixels["pixel_values"])
    assert torch.equal(embeddings[0, 2:20], vectors[:2].flatten(0, 1))
    assert torch.equal(embeddings[1, 1:10], picture[0])
    assert torch.equal(embeddings[1, 11:20], vectors[2])
    words = torch.tensor([1, 7, 8])
    assert torch.equal(embeddings[0, [0, 1, 20]], model.get_input_embeddings()(words))


@pytest.mark.parametrize("ids", [[1, *VIDEO], [1, *VIDEO, *VIDEO, 5], [1, *VIDEO[1:], 5], [1, 5], [*IMAGE, *VIDEO]])
def test_places_must_match_media(
    model: MplugOwlForConditionalGeneration, recording: OwlRecording, ids: list[int]
) -> None:
    videos = 2 if len(ids) == 10 else 1
    with pytest.raises(ValueError, match=r"must have 9 positions for each of the \d (images|videos), but it has \d+"):
        model(torch.tensor([ids]), video_pixel_values=recording.media(0, videos)["video_pixel_values"])


def test_a_padded_batch_answers_like_single_prompts(
    model: MplugOwlForConditionalGeneration, recording: OwlRecording
) -> None:
    pixels = recording.media(1, 2)
    rows = [[1, 7, *VIDEO, 8, 9, 30, 31], [1, *IMAGE, *VIDEO, 8], [1, 40, 41]]
    longest = max(map(len, rows))
    ids = torch.tensor([[3] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    batch = model.generate(ids, mask, **pixels, **options)
    clips = pixels["video_pixel_values"]
    media: list[dict[str, Tensor]] = [
        {"video_pixel_values": clips[:1]},
        {"pixel_values": pixels["pixel_values"], "video_pixel_values": clips[1:]},
        {},
    ]
    for row, own in enumerate(media):
        alone = model.generate(torch.tensor(rows[row : row + 1]), **own, **options)
        length = alone.sequences.shape[1]
        assert torch.equal(batch.sequences[row, :length], alone.sequences[0])
        ours, theirs = (
            torch.stack([step[index] for step in found.logits[:length]]) for found, index in ((batch, row), (alone, 0))
        )
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_encoded_media_can_be_used_again(model: MplugOwlForConditionalGeneration, recording: OwlRecording) -> None:
    ids, clip = torch.tensor([[1, 7, *VIDEO, 8]]), recording.media(0, 1)["video_pixel_values"]
    with torch.no_grad():
        vectors = model.encode_media(clip)
    once = model.generate(ids, video_pixel_values=clip, max_new_tokens=6)
    assert torch.equal(model.generate(ids, media={-2: vectors}, max_new_tokens=6), once)


@torch.no_grad()
def test_a_clip_of_one_frame_is_an_image(model: MplugOwlForConditionalGeneration, recording: OwlRecording) -> None:
    image = recording.media(1, 0)["pixel_values"]
    assert torch.equal(model.encode_media(image[:, :, None]), model.encode_media(image))


@pytest.mark.parametrize("shape", [(1, 3, 4, 42, 28), (1, 1, 4, 42, 42), (1, 3, 28, 28)])
def test_pixels_of_another_size_are_refused(model: MplugOwlForConditionalGeneration, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixel_values must have the shape .* got \(1, "):
        model.encode_media(torch.zeros(shape))


@pytest.mark.parametrize("sharded", [False, True])
def test_saved_weights_are_the_same(tmp_path: Path, sharded: bool) -> None:
    model = load()
    model.save_pretrained(tmp_path, max_shard_size="150KB" if sharded else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == (3 if sharded else 1)
    again = load(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert "n_head" not in config  # not repeated from text_config
    assert config["model_type"] == "mplug-owl"


def test_bfloat16() -> None:
    model, reference = load(dtype=torch.bfloat16, device_map={"": "cpu"}), load()
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    inputs = MplugOwlProcessor.from_pretrained(CHECKPOINT)("<|video|>\nHuman: hi\nAI: ", videos=[CLIP])
    with torch.no_grad():
        ours, exact = model(**inputs).logits.float(), reference(**inputs).logits
    assert nn.functional.cosine_similarity(ours, exact, dim=-1).min() > 0.99


def test_float16_is_refused() -> None:
    message = "dtype must be bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        load(dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        load().half().encode_media(torch.zeros(1, 3, 4, 28, 28))


QUERY, HEAD = "abstractor.vit_eos", "language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (QUERY, None, rf"{QUERY} is missing \(1 in all\)"),
        ("vision_model.extra.weight", torch.zeros(2), r"vision_model.extra.weight is unexpected"),
        (QUERY, torch.zeros(1, 1, 5), "shape|mismatch"),
    ],
)
def test_wrong_weights_are_an_error(tmp_path: Path, name: str, value: Tensor | None, message: str) -> None:
    load().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(name, None)
    save_file({**weights, **({} if value is None else {name: value})}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(tmp_path)


def test_rotary_buffers_of_older_files_are_ignored(tmp_path: Path) -> None:
    recording = OwlRecording("llama_generate")
    model = recording.model()
    model.save_pretrained(tmp_path)
    names = [name for name in recording.tensors if name.endswith("inv_freq")]
    assert names
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {name.removeprefix("state/"): recording[name] for name in names}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(tmp_path).query_tokens, model.query_tokens)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('executed')",)


def test_pickled_code_is_not_executed(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    with (folder / "pytorch_model-00001-of-00004.bin").open("wb") as file:
        torch.save({"query_tokens": Malicious()}, file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        load(folder)


def test_a_fresh_network_reads_frames_one_by_one() -> None:
    torch.manual_seed(0)
    model = MplugOwlForConditionalGeneration(MplugOwlConfig.from_pretrained(CHECKPOINT)).eval()
    clip = torch.randn(1, 3, 4, 28, 28)
    with torch.no_grad():
        tokens = model.vision_model(clip)[:, :, 1:]
        alone = model.vision_model(clip[:, :, 1])[:, :, 1:]
    assert len(model.query_tokens.unique(dim=1)[0]) == model.config.num_query_tokens  # equal ones would stay equal
    assert all(not layer.temporal.up_proj.weight.any() for layer in model.vision_model.encoder.layers)
    assert tokens.shape == (1, 4, 4, 24)
    assert torch.allclose(tokens[:, 1:2], alone, atol=1e-5)
    assert float(model.vision_model.encoder.layers[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="must be the hidden_size of vision_config, 1024, but they are 512 and 1024"):
        MplugOwlConfig(visual_abstractor_config={"hidden_size": 512})


def test_the_calls_of_the_original_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The published example with these classes, on the tiny checkpoint and the CPU."""
    folder = str(CHECKPOINT)
    model = MplugOwlForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.bfloat16, device_map={"": torch.device("cpu")}
    )
    image_processor = MplugOwlImageProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = MplugOwlProcessor(image_processor, tokenizer)
    inputs = processor(text=[prompts()["readme_zh"]], videos=[str(CLIP)], num_frames=4, return_tensors="pt")
    inputs = {k: v.bfloat16() if v.dtype == torch.float else v for k, v in inputs.items()}
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    with torch.no_grad():
        res = model.generate(**inputs, do_sample=True, top_k=5, max_length=12)
    assert 1 <= res.shape[1] <= 11
    assert isinstance(tokenizer.decode(res.tolist()[0], skip_special_tokens=True), str)


@pytest.mark.parametrize("is_given", [False, True])
@torch.no_grad()
def test_a_bloom_decoder_computes_what_transformers_does(is_given: bool) -> None:
    """Also one that the model was given, with causal and with padded rows."""
    torch.manual_seed(0)
    config = MplugOwlConfig.from_pretrained(CHECKPOINT)
    stock = AutoModelForCausalLM.from_config(deepcopy(config.text_config)).eval()
    decoder = AutoModelForCausalLM.from_config(config.text_config) if is_given else None
    model = MplugOwlForConditionalGeneration(config, language_model=decoder).eval()
    model.language_model.load_state_dict(stock.state_dict())
    ids = torch.randint(5, 100, (2, 9))
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    for mask in (None, padded):
        kept = torch.ones_like(ids) if mask is None else mask
        ours, theirs = (each(ids, attention_mask=mask).logits[kept.bool()] for each in (model.language_model, stock))
        assert torch.allclose(ours, theirs, atol=1e-6)
