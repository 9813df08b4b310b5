"""`mplug push`: offers a model on a model hub, with a card that says how well it does and how that was measured."""

import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cli.data import TrackingUri

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def push(
    model: Annotated[str, typer.Argument(help="Folder or URI of a model, or a registered version: name@champion.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; created if it does not exist.")],
    license: Annotated[str, typer.Option(help="SPDX identifier of the license of the weights, such as apache-2.0.")],
    hub: Annotated[str, typer.Option(help="huggingface or modelscope.")] = "huggingface",
    evaluation: Annotated[
        list[str] | None,
        typer.Option(help="Folder of an evaluation for the card; repeatable. Adds to a version's own."),
    ] = None,
    public: Annotated[
        bool, typer.Option(help="Create the repository for everybody, instead of for its owner.")
    ] = False,
    dry_run: Annotated[Path | None, typer.Option(help="Write the files to this new folder; upload nothing.")] = None,
    tracking_uri: TrackingUri = "",
) -> None:
    """Upload a model to Hugging Face or ModelScope, with a model card of its scores and their protocol.

    The card, `results.json` and the configuration name no bucket, server or folder of yours. The same command continues
    an upload that was interrupted. Log in before with `hf auth login` or `ms-hub login`.

    Example: `mplug push mplug-video-retrieval@champion alice/mplug-retrieval --license apache-2.0 --dry-run card`
    """
    from cli.models import find_evaluations, find_model
    from model.errors import ConfigError
    from model.evaluation.card import Release, write_release
    from model.hub import HUBS, PRIVATE, PUBLIC, upload

    if hub not in HUBS:
        raise typer.BadParameter(f"must be {' or '.join(HUBS)}, got {hub}.", param_hint="--hub")
    if not REPOSITORY.fullmatch(repo):
        raise typer.BadParameter(f"must be owner/name, got {repo}.", param_hint="OWNER/NAME")
    source, own = find_model(model, tracking_uri)
    evaluations = [
        *own,
        *(each for reference in evaluation or [] for each in find_evaluations(reference, tracking_uri)),
    ]
    release = Release(model=source, repo=repo, hub=hub, license=license, evaluations=evaluations)
    if not evaluations:
        print(f"warning: the card has no scores; --evaluation adds those of {model}", file=sys.stderr)
    if dry_run:
        if dry_run.exists():
            raise ConfigError(f"{dry_run} must not exist: all files of the repository are written to it.")
        write_release(release, dry_run)
        print(dry_run)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_release(release, Path(folder))
        print(upload(Path(folder), repo, hub, PUBLIC if public else PRIVATE))
