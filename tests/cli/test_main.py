import subprocess
import sys

import pytest
from typer.main import get_command

from cli.main import app


def commands(group=None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    group = group or get_command(app)
    if not hasattr(group, "commands"):
        return [path]
    return [leaf for name, child in group.commands.items() for leaf in commands(child, (*path, name))]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_shows_an_example_of_the_command(path: tuple[str, ...]) -> None:
    group = get_command(app)
    for name in path:
        group = group.commands[name]
    assert "Example: `" in (group.help or "")
    assert f"mplug {' '.join(path)}" in (group.help or "")


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, cli.main; print([name for name in ('torch', 'kfp', 'mlflow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
