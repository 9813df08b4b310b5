"""Trains one run like `mplug train`, in this step or as a job on several nodes."""

from kfp.dsl import Model, Output

from components.image import component


@component()
def train(
    config: str, shards: dict[str, str], root: str, decoder: str, tokenizers: dict[str, str], pretrained: str,
    init: str, nodes: int, processes: int, image: str, namespace: str, deadline_hours: float, overrides: list[str],
    tracking: dict[str, str], code_version: str, model: Output[Model],
) -> str:  # fmt: skip
    """Returns the URI of the trained model, <root>/models/<name>-<init>/<version>, which is also that of `model`.

    A config whose dataset has a tokenizer in `tokenizers` trains a decoder from nothing; any other uses `decoder`.
    `init` is "pretrained" or starts from fresh visual weights. With 0 `nodes` it trains in this step on `processes`
    processes, otherwise as a PyTorchJob with `processes` per node (0: one per GPU).
    """
    from components.jobs.launcher import train_on_cluster
    from model.config.load import load_config, preset_dataset
    from model.errors import ProcessFailedError, exit_codes
    from model.training.attempts import published_model
    from model.training.launch import launch

    settings = {
        "name": f"{config}-{init}".replace("_", "-"),
        "output": root,
        "code_version": code_version,
        "data.shards": shards[preset_dataset(config)],
        "model.decoder": tokenizers.get(preset_dataset(config), decoder),
        "model.init_from": pretrained if init == "pretrained" else "",
        **{f"tracking.{key}": value for key, value in tracking.items()},
    }
    arguments = [f"{key}={value}" for key, value in settings.items()] + overrides
    with exit_codes():
        if nodes:
            train_on_cluster(config, arguments, nodes, processes, image, namespace, deadline_hours)
        elif code := launch(config, arguments, processes):
            raise ProcessFailedError(f"{settings['name']} ended with exit code {code}; see its log.", code)
        model.uri = published_model(load_config(config, arguments))
        model.metadata.update(config=config, data=settings["data.shards"], initial=settings["model.init_from"])
        return model.uri
