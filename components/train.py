"""Trains one run: the same command line as `mplug train`, on as many processes as the step is given."""

from components.image import component


@component()
def train(
    config: str, dataset: str, shards: dict[str, str], root: str, decoder: str, pretrained: str, init: str,
    processes: int, overrides: list[str], tracking: dict[str, str], code_version: str,
) -> str:  # fmt: skip
    """Returns the URI of the trained model, <root>/models/<name>-<init>/<version>.

    `init` is "pretrained" to start from `pretrained`, or anything else to start from fresh visual weights.
    """
    from components.torchrun import launch
    from model import manifest, storage

    name = f"{config}-{init}".replace("_", "-")
    settings = {
        "name": name,
        "output": root,
        "data.shards": shards[dataset],
        "model.decoder": decoder,
        "model.init_from": pretrained if init == "pretrained" else "",
        **{f"tracking.{key}": value for key, value in tracking.items()},
    }
    code = launch(config, [f"{key}={value}" for key, value in settings.items()] + overrides, processes)
    if code:
        raise SystemExit(code)
    return manifest.latest(storage.join(root, "models", name))
