"""Files, make targets and commands in the documents exist."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from cli.main import app
from tests.helpers.owl import CHECKPOINT, CLIP
from tests.helpers.paths import ROOT
from tests.helpers.upstream import Recording

DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/configuration.md",
        "docs/data.md",
        "docs/training.md",
        "model/data/README.md",
        "model/training/README.md",
        "k8s/README.md",
    )
]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def lines(document: Path) -> list[str]:
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    whole = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition(" # ")[0].strip() for line in whole if line.strip()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_document_exists(document: Path) -> None:
    for line in lines(document):
        line = line.partition(" < ")[0]
        inner = re.search(r"\$\((mplug [^)]*)\)", line)  # name=$(mplug …)
        words = shlex.split(inner[1] if inner else line)
        if words[0] == "make":
            assert set(words[1:]) <= TARGETS, line
        elif words[0].endswith("mplug"):
            check_command(words[1:], line)
        for path in re.findall(r"\bk8s/[\w./-]*\w", line):
            assert (ROOT / path).exists() or "overlays/mine" in path or "/" not in path, line


def check_command(words: list[str], line: str) -> None:
    """Checks a command of `mplug` and its options, and the command inside a job."""
    group, path = get_command(app), []
    while words and hasattr(group, "commands"):
        group, path, words = group.commands[words[0]], [*path, words[0]], words[1:]
    if path[:1] == ["job"] and path[1] in ("apply", "render"):
        inner = [position for position, word in enumerate(words) if word in ("train", "evaluate", "data", "convert")]
        check_command(words[inner[0] :], line)
        words = words[: inner[0]]
    options = {name for parameter in group.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, line


def python_example(name: str) -> str:
    """The example of README that contains a name."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if name in block)
    return str(example)


def test_the_chat_example_runs_on_a_published_folder(capsys: pytest.CaptureFixture[str]) -> None:
    example = python_example("MplugOwlProcessor").replace("mplug-youku-bloomz-7b", str(CHECKPOINT))
    example = example.replace("yoga.mp4", str(CLIP)).replace('{"": 0}', '{"": "cpu"}').replace("512", "12")
    exec(example, {})
    assert capsys.readouterr().out.strip()


def test_the_python_example_runs_on_converted_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = python_example("MPlugVideoProcessor")
    (tmp_path / "work").mkdir()
    for name, folder in (("caption", "mplug-1.3b"), ("cls", "classifier"), ("retrieval", "retriever")):
        options = {"class_names": list("abcde"), "num_frames": 4} if name == "cls" else {}
        Recording(name).convert(tmp_path / name, **options).rename(tmp_path / "work" / folder)
    shutil.copy(next((corpus / "videos").glob("*.mp4")), tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(example, {})
    caption, category, similarities = capsys.readouterr().out.strip().split("\n")[-3:]
    assert caption.startswith("['")
    assert category in "abcde"
    assert similarities.startswith("tensor([[")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_linked_file_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_no_file_is_longer_than_350_lines() -> None:
    for package in ("cli", "pipelines", "components", "model", "tests", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path
