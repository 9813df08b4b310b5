"""The memory limit of this container, the number of OOM kills (cgroup v1 and v2), and which process they affect."""

import resource
from contextlib import suppress
from pathlib import Path

OWN_CGROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
OWN_SCORE = Path("/proc/self/oom_score_adj")
NO_LIMIT = 2**60
"""cgroup v1 reports about 2**63 if no limit is set."""


def memory_limit() -> int | None:
    """Bytes; None if no limit is set."""
    for folder in _folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < NO_LIMIT:
                return int(text)
    return None


def memory_kills() -> int:
    """OOM kills since the cgroup was created; 0 if the kernel does not count them."""
    for folder in _folders():
        for name in ("memory.events", "memory.oom_control"):
            for line in _read(folder / name).splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill":
                    return int(count)
    return 0


def kill_before_this(process: int) -> None:
    """Makes the OOM killer prefer `process`, and children that it starts later, to this process.

    It kills the process with the most memory, where one unit of oom_score_adj counts as a thousandth of the limit.
    """
    limit = memory_limit()
    if not limit:
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = int(_read(OWN_SCORE) or 0)
    raised = min(own + 1000 * peak // limit + 10, 1000)  # 10 more cover its page tables
    with suppress(OSError):  # the process has already ended
        Path(f"/proc/{process}/oom_score_adj").write_text(str(raised), encoding="utf-8")


def _folders() -> list[Path]:
    """Folders that may hold this process's memory accounting: its own path, or the mount point in a container."""
    found = []
    for line in _read(OWN_CGROUPS).splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found += [MOUNT / "memory" / path.lstrip("/"), MOUNT / "memory"]
        elif number == "0":
            found += [MOUNT / path.lstrip("/"), MOUNT]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
