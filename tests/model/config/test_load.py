import pytest

from model.config.load import list_presets, load_config, parse_config
from model.config.networks import VisionConfig
from model.errors import ConfigError
from model.mplug_video.configuration import TimeSformerConfig

COMPLETE = ["data.shards=s", "model.decoder=d"]


def problems(*overrides: str, preset: str = "tiny_pretraining") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(preset, list(overrides))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_is_complete_except_for_data(preset: str) -> None:
    assert load_config(preset, COMPLETE).data.shards == "s"


def test_overrides_set_nested_fields_and_parse_yaml_numbers() -> None:
    config = load_config("tiny_pretraining", [*COMPLETE, "optim.lr=1e-4", "model.vision.num_frames=8"])
    assert config.optim.lr == 1e-4
    assert config.model.vision.num_frames == 8


def test_a_saved_configuration_loads_unchanged() -> None:
    config = load_config("tiny_pretraining", COMPLETE)
    assert parse_config(config.model_dump(mode="json")) == config


def test_all_problems_are_reported_at_once_one_line_each() -> None:
    lines = problems(
        "optim.lrr=1", "training.steps=many", "data.batch_size=7", "training.gradient_accumulation=2", "foo"
    )
    assert lines[0] == "override must be dotted.key=value, got 'foo'."
    assert any(line == "optim.lrr is not a known key. The nearest is optim.lr." for line in lines)
    assert any(line.startswith("training.steps: input should be a valid integer, got 'many'") for line in lines)
    assert any(line.startswith("data.batch_size must be a multiple of") for line in lines)
    assert any(line.startswith("data.shards must name") for line in lines)
    assert any(line.startswith("model.decoder or model.init_from") for line in lines)
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("trainig.steps=3", "training.steps"), ("steps=3", "training.steps"), ("data.batchsize=8", "data.batch_size")],
)
def test_an_unknown_key_suggests_the_nearest_one(override: str, nearest: str) -> None:
    (line,) = problems(*COMPLETE, override)
    assert f"The nearest is {nearest}" in line


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.steps=1.5", "training.steps"),
        ("training.steps='3'", "training.steps"),
        ("optim.lr=-1", "optim.lr"),
        ("training.precision=fp8", "training.precision"),
        ("model.vision.image_size=[1]", "model.vision.image_size"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.lr=[1", "optim.lr must be a valid YAML value"),
        ("typo={}", "typo is not a known key"),
        ("optim.typo={}", "optim.typo is not a known key"),
        ("optim={1: 2}", "optim.1 is not a known key"),
        ("training.steps=2024-01-01", "training.steps"),
        ("model.vision.patch_size=0", "model.vision.patch_size"),
        ("model.vision.hiden_size=5", "model.vision.hiden_size is not a known key. The nearest is model.vision.hidden"),
        ("name=../escape", "name"),
    ],
)
def test_an_invalid_value_is_rejected_with_its_key(override: str, complaint: str) -> None:
    assert any(line.startswith(complaint) for line in problems(*COMPLETE, override))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["optim.min_lr=1"], "optim.min_lr must not exceed optim.lr"),
        (["optim.warmup_steps=600"], "optim.warmup_steps must be below training.steps"),
        (["model.vision.image_size=65"], "model.vision.image_size must be a multiple"),
        (["model.vision.num_attention_heads=5"], "model.vision.hidden_size must be a multiple"),
        (["training.compile=true", "training.zero_stage=3"], "training.compile must be false with"),
    ],
)
def test_invalid_combinations_are_rejected(overrides: list[str], complaint: str) -> None:
    assert any(line.startswith(complaint) for line in problems(*COMPLETE, *overrides))


def test_a_decoder_cannot_be_trained_frozen() -> None:
    lines = problems(*COMPLETE, "model.freeze_decoder=true", preset="tiny_decoder")
    assert lines == ["model.freeze_decoder must be false for task language_modeling: nothing else could learn."]


def test_visual_settings_are_rejected_for_language_modeling() -> None:
    for setting in ("training.compile=true", "training.activation_checkpointing=[decoder]"):
        (line,) = problems(*COMPLETE, setting, preset="tiny_decoder")
        assert "must be left out for task language_modeling" in line


def test_an_unknown_preset_suggests_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean tiny_decoder"):
        load_config("tiny_decodr")


def test_invalid_yaml_is_a_one_line_error(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not valid YAML") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_non_string_keys_are_rejected(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("on: true\n1: 2\n")
    with pytest.raises(ConfigError, match="True is not a known key"):
        load_config(path, COMPLETE)


def test_vision_defaults_match_the_network() -> None:
    assert VisionConfig().model_dump() == {key: getattr(TimeSformerConfig(), key) for key in VisionConfig.model_fields}
