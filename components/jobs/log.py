"""Follows the log of the first pod of a job, through broken connections and pod replacements."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from components.jobs.client import Cluster

log = logging.getLogger("mplug")
LAST_LINES_S = 5.0


@contextmanager
def show_log(cluster: Cluster, kind: str, name: str, seen: Callable[[str], None]) -> Iterator[None]:
    """Prints the log of the first pod during the block, and passes each line to `seen`. Prints the rest at the end."""
    ended = threading.Event()
    reader = threading.Thread(target=_show_log, args=(cluster, kind, name, ended, seen), daemon=True)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        reader.join(LAST_LINES_S)


def _show_log(cluster: Cluster, kind: str, name: str, ended: threading.Event, seen: Callable[[str], None]) -> None:
    shown: dict[str, str] = {}
    while True:
        is_last = ended.is_set()
        try:
            print_log(cluster, kind, name, shown, seen, follow=not is_last)
        except Exception as error:  # an error of the log must not end the job
            log.debug("the log of %s: %s", name, error)
        if is_last:
            return
        ended.wait(1)


def print_log(
    cluster: Cluster,
    kind: str,
    name: str,
    shown: dict[str, str],
    seen: Callable[[str], None] = lambda _line: None,
    *,
    follow: bool,
) -> None:
    """Prints new lines. `shown` holds the time of the last printed line of each pod by UID."""
    for pod in cluster.pods(kind, name, first=True):
        uid, known = pod["metadata"]["uid"], shown.get(pod["metadata"]["uid"], "")
        if (pod.get("status") or {}).get("phase") not in ("Running", "Succeeded", "Failed"):
            continue
        for when, line in cluster.log_lines(pod["metadata"]["name"], follow=follow):
            if when > known:  # a log that is read again starts from the beginning
                print(line, flush=True)
                shown[uid] = when
                seen(line)
