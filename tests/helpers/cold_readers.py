"""Starts processes without an S3 client, each with 64 threads that read at once: `cold_readers.py URI RUNS`."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from model import s3, storage

THREADS = 64


def read_at_once(uri: str) -> None:
    start = Barrier(THREADS)

    def read() -> tuple[bytes, bool]:
        start.wait()
        return storage.read(uri), storage.exists(uri)

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(read) for _ in range(THREADS)]:
            assert future.result() == (b"data", True)


def main(uri: str, runs: int) -> None:
    """Exits with the number of processes that failed."""
    failed = 0
    for _ in range(runs):
        s3._creating.acquire()  # like a thread that does not exist in the child
        child = os.fork()  # imports are complete, but there are no threads or clients
        if child:
            s3._creating.release()
        else:
            code = 1
            signal.alarm(20)
            try:
                read_at_once(uri)
                code = 0
            finally:
                os._exit(code)
        failed += os.waitpid(child, 0)[1] != 0
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
