"""The memory limit of this container, and how often the kernel has killed a process for it (cgroup v1 and v2)."""

from pathlib import Path

OWN_CGROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
NO_LIMIT = 2**60
"""cgroup v1 shows about 2**63 for no limit."""


def memory_limit() -> int | None:
    """Bytes; None without a limit."""
    for folder in _folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < NO_LIMIT:
                return int(text)
    return None


def memory_kills() -> int:
    """Processes that were killed since the cgroup was made; 0 if the kernel does not count them."""
    for folder in _folders():
        for name in ("memory.events", "memory.oom_control"):
            for line in _read(folder / name).splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill":
                    return int(count)
    return 0


def _folders() -> list[Path]:
    """Folders that may account this process's memory: its own path, or in a container the mount itself."""
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
