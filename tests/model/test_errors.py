"""Exit codes, termination messages and log output of a process that ends with an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging
from model.errors import ConfigError
from model.errors import exit_codes
with exit_codes():
    logging.getLogger("urllib3.connectionpool").warning("Retrying (Retry(total=1)) after connection broken")
    logging.getLogger("matplotlib.font_manager").info("generated new fontManager")
    logging.getLogger("mplug").info("ours")
    {}
"""


def run(tmp_path: Path, ends: str) -> "tuple[subprocess.CompletedProcess[str], str]":
    where = tmp_path / "termination-log"
    where.touch()
    environment = {**os.environ, "MPLUG_TERMINATION_LOG": str(where)}
    command = [sys.executable, "-c", SCRIPT.format(ends)]
    return subprocess.run(command, capture_output=True, text=True, env=environment), where.read_text()


def test_library_log_messages_are_hidden(tmp_path: Path) -> None:
    ended, left = run(tmp_path, "pass")
    assert (ended.returncode, ended.stderr, left) == (0, "ours\n", "")


@pytest.mark.parametrize(
    ("ends", "code", "left"),
    [
        ("raise ConfigError('a must be 1.\\nb must be 2.')", 2, "a must be 1. b must be 2."),
        ("raise KeyError('a bug')", 1, "KeyError: 'a bug'"),
    ],
)
def test_the_reason_is_written_to_the_termination_message(tmp_path: Path, ends: str, code: int, left: str) -> None:
    ended, found = run(tmp_path, ends)
    assert (ended.returncode, found) == (code, f"exit code {code}: {left}\n")


def test_the_message_of_an_earlier_attempt_is_cleared(tmp_path: Path) -> None:
    _, left = run(tmp_path, "from model.errors import clear_termination as c, note_termination as n; n(137, 'x'); c()")
    assert left == ""
