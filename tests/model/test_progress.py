"""Progress without a terminal, as in the log of a container."""

import os
import pty
import subprocess
import sys
import termios
import time
from itertools import pairwise

SCRIPT = """
import sys, time
from model import progress
progress.LINE_EVERY_S = float(sys.argv[1])
bar = progress.progress(range(40), total=40, desc="sharding", unit="clip")
for number in bar:
    bar.set_postfix(loss=number, refresh=False)
    time.sleep(0.05)
"""


def test_a_log_receives_complete_lines_during_the_work() -> None:
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, "0.5"], stderr=subprocess.PIPE, bufsize=0)
    assert child.stderr
    begun, lines = time.monotonic(), list[tuple[float, bytes]]()
    for line in child.stderr:
        lines.append((time.monotonic() - begun, line))
    assert len(lines) >= 4, lines
    assert all(later - earlier > 0.4 for (earlier, _), (later, _) in pairwise(lines[:-1])), lines
    assert all(b"\r" not in line and line.startswith(b"sharding:") for _, line in lines)
    assert any(b"loss=" in line and b"<00:" in line and b"clip/s" in line for _, line in lines[1:-1])
    assert lines[1][0] < lines[-1][0] - 0.4  # not only at the end
    assert b"40/40" in lines[-1][1]


def test_lines_are_at_least_ten_seconds_apart() -> None:
    from model.progress import LINE_EVERY_S

    assert LINE_EVERY_S == 10
    ended = subprocess.run([sys.executable, "-c", SCRIPT, "10"], capture_output=True, text=True)
    assert len(ended.stderr.splitlines()) == 2  # first and last line


def test_a_terminal_shows_a_bar() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen([sys.executable, "-c", SCRIPT, "10"], stderr=theirs):
        os.close(theirs)
        output = b""
        try:
            while data := os.read(ours, 4096):
                output += data
        except OSError:  # the other end has been closed
            pass
    os.close(ours)
    assert output.count(b"\r") > 3
