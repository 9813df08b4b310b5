"""Ends a run that stands still, and makes all of its processes end together with one code.

A thread in every process watches the deadline of the section that the process is in, and tells a small store of its own
that the process lives. The first process reads those signs of life. Whoever finds something wrong writes a verdict into
the store; every process then prints where its threads stand and leaves. No collective is used, so this works while the
main threads hang in one.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from model.config.schema import WatchdogConfig
from model.errors import LOST, LostProcessError, exit_code
from model.parent import PARENT_PID
from model.training.distributed import Processes, as_lost_process

log = logging.getLogger("mplug")
INTERVAL_S, LAST_WORDS_S, EXIT_WITHIN_S = 1.0, 10.0, 30.0
VERDICT = "verdict"
Section = Literal["setup", "first_step", "step", "checkpoint", "evaluation"]


@dataclass(frozen=True)
class Verdict:
    """Why a run ends, and with which exit code."""

    code: int
    reason: str


class Watchdog:
    """One per process."""

    def __init__(self, config: WatchdogConfig) -> None:
        self.config = config
        self.rank, self.world_size = int(os.environ["RANK"]), 1
        self.parent = int(os.environ.get(PARENT_PID, os.getppid()))  # which may have gone before this line
        self.store: TCPStore | None = None
        self.answered = 0.0
        """When the store last did."""
        self.alive: dict[int, tuple[bytes, float]] = {}
        """By process: its last sign of life, and when it was new."""
        self.stopped = threading.Event()
        self.on_exit: Callable[[], None] = lambda: None
        """What has to be said to others before this process is ended."""
        self.enter("setup")
        self._start(self._watch, "watchdog")

    def _start(self, work: Callable[[], None], name: str) -> None:
        """In a thread. Without it nobody would watch: an error of it is the run's."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                log.exception("the thread %s of process %d has failed", name, self.rank)
                self._leave(Verdict(exit_code(error), f"process {self.rank}, {name}: {type(error).__name__}: {error}"))

        threading.Thread(target=run, name=name, daemon=True).start()

    def enter(self, section: Section) -> None:
        """From now on the section's deadline counts."""
        self.section, self.since = section, time.monotonic()

    @contextmanager
    def together(self, group: Processes) -> Iterator[None]:
        """While it lasts, the end of one process by an error is the end of all, with the same exit code."""
        self._open_store(group)
        try:
            yield
            self.stopped.set()  # before the first process, whose store it is, may leave
            dist.barrier(group=group.control)
        except BaseException as error:
            found = as_lost_process(error)
            self._conclude(found)
            # CUDA and NCCL may wait for ever for a peer that is gone, until the interpreter ends
            threading.Thread(target=_exit_later, args=(exit_code(found),), daemon=True).start()
            raise found from (error if found is not error else error.__cause__)

    def _open_store(self, group: Processes) -> None:
        timeout = timedelta(seconds=self.config.silence_s)
        host = os.environ["MASTER_ADDR"]
        if group.is_main:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = group.from_main(lambda: store.port)
        if not group.is_main:
            store = TCPStore(host, port, is_master=False, timeout=timeout)
        store.set(f"alive/{group.rank}", "0")
        dist.barrier(group=group.control)
        self.world_size, self.store, self.answered = group.world_size, store, time.monotonic()
        self._start(self._pulse, "watchdog-pulse")

    def _watch(self) -> None:
        """Never waits for anybody: neither for the main thread nor for the store."""
        while not self.stopped.wait(INTERVAL_S):
            if os.getppid() != self.parent:
                self._leave(Verdict(LOST, f"the launcher of process {self.rank} is gone"))
            name, now = self.section, time.monotonic()
            limit = getattr(self.config, f"{name}_s")
            if now - self.since > limit:
                self._leave(Verdict(LOST, f"process {self.rank} is {limit:g} s in {name} (watchdog.{name}_s)"))
            if self.store and now - self.answered > self.config.silence_s:
                silence = f"{self.config.silence_s:g} s (watchdog.silence_s)"
                self._leave(Verdict(LOST, f"process 0 does not answer for {silence}"))

    def _pulse(self) -> None:
        """Tells the store that this process lives, and reads there whether the run is to end."""
        assert self.store
        count, main_sign = 0, b""
        while not self.stopped.wait(INTERVAL_S):
            count += 1
            try:
                self.store.set(f"alive/{self.rank}", str(count))
                verdict = self._verdict() or (self._missing() if self.rank == 0 else None)
                sign = self.store.get("alive/0")  # the store answers also where the first process hangs
                if sign != main_sign:
                    main_sign, self.answered = sign, time.monotonic()
            except RuntimeError:  # the first process is gone; `_watch` gives it its time
                continue
            if verdict and not self.stopped.is_set():
                self._leave(verdict)

    def _verdict(self) -> Verdict | None:
        assert self.store
        return Verdict(**json.loads(self.store.get(VERDICT))) if self.store.check([VERDICT]) else None

    def _last_verdict(self) -> Verdict | None:
        try:
            answers = time.monotonic() - self.answered < 4 * INTERVAL_S
            return self._verdict() if self.store and answers else None
        except RuntimeError:
            return None

    def _missing(self) -> Verdict | None:
        """Looks for a process that gives no sign of life; the first process does this."""
        assert self.store
        now = time.monotonic()
        for rank, sign in enumerate(self.store.multi_get([f"alive/{rank}" for rank in range(self.world_size)])):
            if self.alive.get(rank, (b"", 0.0))[0] != sign:
                self.alive[rank] = (sign, now)
            elif now - self.alive[rank][1] > self.config.silence_s:
                silence = f"{self.config.silence_s:g} s (watchdog.silence_s)"
                return Verdict(LOST, f"process {rank} has given no sign of life for {silence}")
        return None

    def _tell(self, verdict: Verdict) -> None:
        """The first verdict stands. A store that does not answer is that of a process that the others miss as well."""
        try:
            if self.store and time.monotonic() - self.answered < 3 * INTERVAL_S:
                self.store.compare_set(VERDICT, "", json.dumps(verdict.__dict__))
        except RuntimeError:
            pass

    def _leave(self, verdict: Verdict) -> None:
        self._tell(verdict)
        print(f"error: {verdict.reason}; process {self.rank} was in {self.section}:", file=sys.stderr, flush=True)
        print(_stacks(), file=sys.stderr, flush=True)
        speaker = threading.Thread(target=self.on_exit, daemon=True)
        speaker.start()
        self._linger()
        speaker.join(LAST_WORDS_S)
        os._exit(verdict.code)

    def _conclude(self, error: BaseException) -> None:
        """Tells the others why this process ends; one that only lost another ends as that one says."""
        self.stopped.set()
        if isinstance(error, SystemExit):  # every process ends so by itself
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever asks now asks for what is happening
        if isinstance(error, LostProcessError):
            time.sleep(2 * INTERVAL_S)
            verdict = self._last_verdict()
            if verdict and verdict.code != LOST:
                log.error("process %d ends with the run: %s", self.rank, verdict.reason)
                sys.exit(verdict.code)
            return
        self._tell(
            Verdict(
                exit_code(error), f"process {self.rank} ended: {(str(error) or type(error).__name__).splitlines()[0]}"
            )
        )
        self._linger()

    def _linger(self) -> None:
        """Leaves the others time to read the verdict, before their collectives break and the store goes."""
        if self.world_size > 1:
            time.sleep(3 * INTERVAL_S if self.rank == 0 else 2 * INTERVAL_S)


def _exit_later(code: int) -> None:
    time.sleep(EXIT_WITHIN_S)
    os._exit(code)


def _stacks() -> str:
    """Where every thread of this process stands, the main thread first; threads that stand alike are told once."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    places: dict[str, list[str]] = {}
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: names.get(item[0]) != "MainThread"):
        if ident != threading.get_ident():
            places.setdefault("".join(traceback.format_stack(frame)), []).append(names.get(ident, str(ident)))
    return "\n".join(f"{', '.join(found)}:\n{place}" for place, found in places.items())
