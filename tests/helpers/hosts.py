"""Two hosts as network namespaces of this machine, each with a name that the other resolves."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def _missing() -> str:
    """Why hosts cannot be created here; empty if they can."""
    name = f"mplug{os.getpid()}-try"
    try:
        for command in (["ip", "netns", "add", name], ["ip", "netns", "del", name], ["unshare", "--uts", "true"]):
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs root and network namespaces: {error}"
    return ""


MISSING = _missing()


@contextmanager
def hosts(*names: str) -> Iterator[list[str]]:
    """Names of the two namespaces, in the order of the host names."""
    spaces = [f"mplug{os.getpid()}-{number}" for number in range(2)]
    links = [f"m{os.getpid()}-{number}" for number in range(2)]
    folders = [Path("/etc/netns") / space for space in spaces]
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("link", "add", links[0], "netns", spaces[0], "type", "veth", "peer", "name", links[1], "netns", spaces[1])
        for number, (space, link, folder) in enumerate(zip(spaces, links, folders, strict=True), start=1):
            _ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            _ip("-n", space, "link", "set", link, "up")
            _ip("-n", space, "link", "set", "lo", "up")
            folder.mkdir(parents=True)
            lines = [f"10.77.0.{other} {name}" for other, name in enumerate(names, start=1)]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        yield spaces
    finally:
        for space, folder in zip(spaces, folders, strict=True):
            subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)


def start(space: str, name: str, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Runs a command on a host in a new session."""
    script = 'hostname "$0" && exec "$@"'
    return subprocess.Popen(
        ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", script, name, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
