"""The command line `mplug`: the main commands, and the groups data, pipeline, job and models."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.data import TrackingUri, data
from cli.job import job
from cli.models import models
from cli.pipeline import pipeline
from cli.push import push
from cli.sweep import sweep
from model.errors import exit_codes

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="mPLUG-Video: video-language pre-training on Youku-mPLUG, from clips to registered models.",
)
app.add_typer(data, name="data")
app.add_typer(pipeline, name="pipeline")
app.add_typer(job, name="job")
app.add_typer(models, name="models")

Config = Annotated[str, typer.Argument(help="Preset (`mplug presets` lists them) or a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as dotted.key=value.")]


@app.command()
def presets() -> None:
    """List the presets of the package.

    Example: `mplug presets`
    """
    from model.config.load import list_presets

    print(*list_presets(), sep="\n")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="GPT-3 folder, image encoder, trained model, or checkpoint.")],
    dest: Annotated[str, typer.Argument(help="Folder or s3:// URI to write; must not exist.")],
    decoder: Annotated[
        Path | None, typer.Option(help="A trained model's GPT-3 folder: tokenizer, number of heads.")
    ] = None,
    vision_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the vision encoder. Default: 8.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize position embeddings to this image size.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Resize frame embeddings to this many frames.")] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="JSON of a head's categories: a list, or name: number.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The published mPLUG-Owl that a training checkpoint started from.")
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="Alpha of LoRA. Default: of adapter_config.json, or 32.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Weight files of an mPLUG-Owl: safetensors (default), or bin as published.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Skip tensors of this name or pattern; repeatable.")] = None,
) -> None:
    """Convert published weights into a folder that `from_pretrained` can load.

    The format of SOURCE is detected from its tensors: a ModelScope GPT-3 folder (also tensor-parallel) becomes a
    decoder, CLIP or a timm ViT a vision encoder, `1_3B_mp_rank_00_model_states.pt` a whole model. A checkpoint of
    mPLUG-Owl's trainer, of all weights or of LoRA, becomes a folder as published, and such a folder one that the
    trainer reads (`--format bin`). DEST/conversion.json records the conversion of every tensor.

    Example: `mplug convert 1_3B_mp_rank_00_model_states.pt work/mplug-1.3b --decoder nlp_gpt3_text-generation_1.3B`

    Example: `mplug convert output/checkpoint-500 work/my-owl --base mplug-youku-bloomz-7b`
    """
    from cli.convert import convert_to
    from model.mplug_video.conversion.shapes import read_class_list
    from model.weight_files import FORMATS

    if format not in (None, *FORMATS):
        raise typer.BadParameter(f"must be {' or '.join(FORMATS)}, got {format}.", param_hint="--format")
    options = {
        "decoder": decoder,
        "vision_heads": vision_heads,
        "image_size": image_size,
        "num_frames": num_frames,
        "class_names": read_class_list(class_names) if class_names else None,
        "base": base,
        "lora_alpha": lora_alpha,
        "format": format,
        "drop": drop,
    }
    conversion = convert_to(source, dest, options)
    print(conversion.summary(), file=sys.stderr)
    print(dest)


@app.command("train")
def train_command(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Training processes on this machine. Default: one per GPU, or one.")
    ] = None,
    profile: Annotated[bool, typer.Option(help="Write a torch profile of three steps.")] = False,
) -> None:
    """Train one run on one or more processes. In a pod of a PyTorchJob, this machine is one of its nodes.

    A run that is started again resumes from its last checkpoint. `trial=2` starts it from scratch.

    Example: `mplug train tiny_pretraining --processes 2 data.shards=work/shards/pretrain@… model.decoder=work/models/…`
    """
    from model.config.load import load_config
    from model.config.schema import micro_batch_size
    from model.training.launch import launch

    settings = [*(overrides or []), *(["training.profile=true"] if profile else [])]
    loaded = load_config(config, settings)  # fails before any process starts
    micro_batch_size(loaded, processes or 1)
    sys.exit(launch(config, settings, processes))


app.command()(sweep)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs per node. 0: one process per node, on its CPU.")] = 8,
    gpu: Annotated[str, typer.Option(help="B200, H200, H100, A100, L40S or A10G.")] = "H100",
    price: Annotated[float, typer.Option(min=0, help="Price of a GPU hour.")] = 0,
    clips: Annotated[int, typer.Option(min=0, help="Clips per epoch, if data.shards does not exist yet.")] = 0,
    measure: Annotated[bool, typer.Option(help="Measure a few steps on this machine for the estimate.")] = False,
) -> None:
    """Estimate memory, checkpoints, data, time and cost of a run before it is launched.

    Needs neither weights nor data. Exits with 1 if the run does not fit.

    Example: `mplug plan pretrain_1.3b --nodes 4 --gpus 8 --gpu H100 --clips 10000000 --price 2.5`
    """
    from cli.plan import Hardware, print_plan
    from model.training.flops import GPUS

    if gpu not in GPUS:
        raise typer.BadParameter(f"must be one of {', '.join(GPUS)}, got {gpu}.", param_hint="--gpu")
    cluster = Hardware(nodes=nodes, gpus=gpus, gpu=gpu, price=price)
    sys.exit(0 if print_plan(config, overrides or [], cluster, clips=clips, measured=measure) else 1)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Folder or URI of a model, trained here, converted or published.")],
    shards: Annotated[str, typer.Argument(help="Folder or URI of a sharded benchmark.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    zero_shot: Annotated[
        bool, typer.Option(help="Ask a model that was not fine-tuned for this: category, caption or answer.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="Name of the prompt of --zero-shot; a wrong one lists all.")] = "",
    rerank: Annotated[
        str, typer.Option(help="A model of task matching, which orders the best results of a retrieval model anew.")
    ] = "",
    top_k: Annotated[int, typer.Option(min=1, help="Results per query that --rerank compares.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips per batch of a process.")] = 32,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. Default: one per GPU, or one.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder or URI for scores.json and predictions.jsonl.")] = "",
    tracking_uri: TrackingUri = "",
) -> None:
    """Score a model on a benchmark, with confidence intervals, and print its metrics.

    The model's own configuration applies, except for settings such as `data.workers=4`, `model.vision.num_frames=8` or
    `task=matching`. In a pod of a PyTorchJob, this machine is one of its nodes.

    Example: `mplug evaluate work/models/tiny-retrieval work/shards/retrieval@… --out work/evaluations/tiny-retrieval`

    Example: `mplug evaluate mplug-youku-bloomz-7b work/shards/classification@… --zero-shot --prompt video`
    """
    if prompt and not zero_shot:
        raise typer.BadParameter("--prompt needs --zero-shot.")
    from model.startup import quick_imports

    with quick_imports():
        from cli.evaluate import run_evaluation
        from model.evaluation.runner import Request
    request = Request(
        model=model,
        shards=shards,
        split=split,
        overrides=overrides or (),
        batch_size=batch_size,
        tracking={"uri": tracking_uri},
        zero_shot=zero_shot,
        prompt=prompt,
        rerank=rerank,
        top_k=top_k,
        out=out,
    )
    sys.exit(run_evaluation(request, processes))


@app.command("report")
def report_command(
    references: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="Folders of evaluations, registered versions, or IDs of MLflow runs."),
    ],
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("report.html"),
    tracking_uri: TrackingUri = "",
) -> None:
    """Write one page about evaluated models: scores, differences, categories, curves, best, worst and changed clips.

    Models of a task are compared with its first one. The page needs no other file and no network.

    Example: `mplug report work/evaluations/retrieval mplug-video-retrieval@champion --out compare.html`
    """
    from cli.models import find_evaluations
    from model.evaluation.report import render_report

    found = [each for reference in references for each in find_evaluations(reference, tracking_uri)]
    out.write_text(render_report(found), encoding="utf-8")
    print(out)


app.command()(push)


@app.command("chat")
def chat_command(
    model: Annotated[str, typer.Argument(help="Folder or URI of an mPLUG-Owl model, published or tuned here.")],
    clip: Annotated[str, typer.Argument(help="A clip to talk about.")] = "",
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames per clip. Default: as in training.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the most likely tokens of this share.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 42,
) -> None:
    """Talk to a model about videos and images in the terminal.

    Answers appear as they are generated; Ctrl-C stops one. `/video PATH` and `/image PATH` show something with the next
    question, `/reset` starts again, Ctrl-D leaves. Lines from a pipe are answered one by one.

    Example: `mplug chat mplug-youku-bloomz-7b yoga.mp4`
    """
    from model.startup import quick_imports

    with quick_imports():
        import torch

        from cli.chat import run_chat
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    run_chat(model, clip, num_frames, max_tokens, sampling)


@app.command()
def doctor(
    root: Annotated[str, typer.Option(help="Folder or s3:// URI to write to and read from.")] = "",
    tracking_uri: TrackingUri = "",
    cluster: Annotated[bool, typer.Option(help="Check the cluster of the current context.")] = False,
    pod: Annotated[
        bool, typer.Option(help="Also run the checks in a pod of the cluster, with the training image.")
    ] = False,
    namespace: Annotated[str, typer.Option(help="Default: that of the current context.")] = "",
    nodes: Annotated[int, typer.Option(min=1, help="Pods of the job that must fit.")] = 1,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes per pod. 0: one per GPU of the PodTemplate, or one.")
    ] = 0,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that this machine must have.")] = 0,
) -> None:
    """Check this machine or a cluster, and suggest remedies. Exits with 1 if a check fails.

    Example: `mplug doctor --cluster --pod --namespace mplug --nodes 8`
    """
    from cli.doctor.examine import Question, print_findings

    question = Question(
        root=root,
        tracking_uri=tracking_uri,
        cluster=cluster or pod,
        namespace=namespace,
        nodes=nodes,
        processes=processes,
        gpus=gpus,
    )
    fits = print_findings(question)
    if pod:
        from cli.doctor.cluster import check_in_pod

        check_in_pod(namespace)
    sys.exit(0 if fits else 1)


@app.command("demo")
def demo_command(
    folder: Annotated[Path, typer.Argument(help="Folder for all results.")] = Path("demo"),
    scale: Annotated[float, typer.Option(help="Factor on the number of clips.")] = 1.0,
    overrides: Overrides = None,
) -> None:
    """Run the whole platform on this machine: synthetic clips, S3 server, pipeline, MLflow, report.

    Example: `mplug demo`
    """
    from cli.demo import run_demo

    sys.exit(run_demo(folder.resolve(), scale=scale, overrides=overrides or []))


@app.command()
def ui(folder: Annotated[Path, typer.Argument(help="The folder of a demo.")] = Path("demo")) -> None:
    """Serve MLflow's page with the results of a demo until Ctrl-C.

    Example: `mplug ui`
    """
    from cli.demo import serve_demo

    serve_demo(folder.resolve())


def main() -> None:
    with exit_codes():
        app()
