"""The watchdog: ends a run that hangs, and makes all of its processes exit together with one code.

A thread in every process checks the deadline of the current section and sends heartbeats to a separate store. The first
process checks the heartbeats. A process that detects a problem writes a verdict to the store; then every process dumps
its stacks and exits. No collectives are used, so this works while the main threads hang in one.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from model.config.schema import WatchdogConfig
from model.distributed import Processes, as_lost_process
from model.errors import LOST, LostProcessError, exit_code
from model.parent import PARENT_PID

log = logging.getLogger("mplug")
INTERVAL_S, ON_EXIT_S, EXIT_WITHIN_S = 1.0, 10.0, 30.0
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
        self.parent = int(os.environ.get(PARENT_PID, os.getppid()))  # the parent may already have ended
        self.store: TCPStore | None = None
        self.answered = 0.0
        """Time of the store's last response."""
        self.silence = f"{config.silence_s:g} s (watchdog.silence_s)"
        self.alive: dict[int, tuple[bytes, float]] = {}
        """Last heartbeat of each process, and the time when it changed."""
        self.stopped = threading.Event()
        self.on_exit: Callable[[], None] = lambda: None
        """Called before this process exits."""
        self.enter("setup")
        self._start(self._watch, "watchdog")

    def _start(self, work: Callable[[], None], name: str) -> None:
        """Starts the thread that watches. If it fails, the run ends, because nothing would watch it any more."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                log.exception("the thread %s of process %d has failed", name, self.rank)
                self._leave(Verdict(exit_code(error), f"process {self.rank}, {name}: {type(error).__name__}: {error}"))

        threading.Thread(target=run, name=name, daemon=True).start()

    def enter(self, section: Section) -> None:
        """Enters a section and starts its deadline."""
        self.section, self.since = section, time.monotonic()

    @contextmanager
    def together(self, group: Processes) -> Iterator[None]:
        """If one process fails in this block, all processes exit with the same code."""
        self._open_store(group)
        try:
            yield
            self.stopped.set()  # before the first process, which hosts the store, may exit
            dist.barrier(group=group.control)
        except BaseException as error:
            found = as_lost_process(error)
            self._conclude(found)
            # at interpreter exit, CUDA and NCCL may wait for a lost peer without limit
            last_resort = threading.Timer(EXIT_WITHIN_S, os._exit, [exit_code(found)])
            last_resort.daemon = True
            last_resort.start()
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
        """Watches this process. Waits neither for the main thread nor for the store."""
        while not self.stopped.wait(INTERVAL_S):
            if os.getppid() != self.parent:
                self._leave(Verdict(LOST, f"the launcher of process {self.rank} has ended"))
            name, now = self.section, time.monotonic()
            limit = getattr(self.config, f"{name}_s")
            if now - self.since > limit:
                spent = f"{limit:g} s in {name} (watchdog.{name}_s)"
                self._leave(Verdict(LOST, f"process {self.rank} spent more than {spent}"))
            if self.store and now - self.answered > self.config.silence_s:
                self._leave(Verdict(LOST, f"process 0 has not answered for {self.silence}"))

    def _pulse(self) -> None:
        """Sends heartbeats of this process to the store, and reads the verdict from it."""
        assert self.store
        count, main_sign = 0, b""
        while not self.stopped.wait(INTERVAL_S):
            count += 1
            try:
                self.store.set(f"alive/{self.rank}", str(count))
                verdict = self._verdict() or (self._missing() if self.rank == 0 else None)
                sign = self.store.get("alive/0")  # the store also answers if the first process hangs
                if sign != main_sign:
                    main_sign, self.answered = sign, time.monotonic()
            except RuntimeError:  # the first process has ended; `_watch` applies the deadline
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
        """A verdict if a process sends no heartbeat. Called by the first process."""
        assert self.store
        now = time.monotonic()
        for rank, sign in enumerate(self.store.multi_get([f"alive/{rank}" for rank in range(self.world_size)])):
            if self.alive.get(rank, (b"", 0.0))[0] != sign:
                self.alive[rank] = (sign, now)
            elif now - self.alive[rank][1] > self.config.silence_s:
                return Verdict(LOST, f"process {rank} has sent no heartbeat for {self.silence}")
        return None

    def _publish(self, verdict: Verdict) -> None:
        """Writes a verdict unless there is one. If the store does not answer, the first process is lost, which all
        processes notice."""
        with suppress(RuntimeError):
            if self.store and time.monotonic() - self.answered < 3 * INTERVAL_S:
                self.store.compare_set(VERDICT, "", json.dumps(verdict.__dict__))

    def _leave(self, verdict: Verdict) -> None:
        self._publish(verdict)
        print(f"error: {verdict.reason}; process {self.rank} was in {self.section}:", file=sys.stderr, flush=True)
        print(_stacks(), file=sys.stderr, flush=True)
        callback = threading.Thread(target=self.on_exit, daemon=True)
        callback.start()
        self._linger()
        callback.join(ON_EXIT_S)
        os._exit(verdict.code)

    def _conclude(self, error: BaseException) -> None:
        """Publishes the reason for the end of this process. A process that only lost a peer takes over its verdict."""
        self.stopped.set()
        if isinstance(error, SystemExit):  # all processes exit by themselves
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is already ending
        if isinstance(error, LostProcessError):
            time.sleep(2 * INTERVAL_S)
            verdict = self._last_verdict()
            if verdict and verdict.code != LOST:
                log.error("process %d ends with the run: %s", self.rank, verdict.reason)
                sys.exit(verdict.code)
            return
        reason = (str(error) or type(error).__name__).splitlines()[0]
        self._publish(Verdict(exit_code(error), f"process {self.rank} ended: {reason}"))
        self._linger()

    def _linger(self) -> None:
        """Waits until the other processes have read the verdict, before collectives fail and the store ends."""
        if self.world_size > 1:
            time.sleep(3 * INTERVAL_S if self.rank == 0 else 2 * INTERVAL_S)


def _stacks() -> str:
    """The stacks of all threads of this process, main thread first. Threads with equal stacks are merged."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    places: dict[str, list[str]] = {}
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: names.get(item[0]) != "MainThread"):
        if ident != threading.get_ident():
            places.setdefault("".join(traceback.format_stack(frame)), []).append(names.get(ident, str(ident)))
    return "\n".join(f"{', '.join(found)}:\n{place}" for place, found in places.items())
