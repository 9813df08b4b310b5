"""Retries calls that failed for a transient reason."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry(call: Callable[[], T], wait_s: Callable[[Exception, int], float]) -> T:
    """Calls until it succeeds. `wait_s` is asked after each failure, with the error and the number of failures so far:
    it returns the seconds until the next call, or raises the error to propagate."""
    failures = 0
    while True:
        try:
            return call()
        except Exception as error:
            failures += 1
            seconds = wait_s(error, failures)
        time.sleep(seconds)


def exponential_s(failures: int, first_s: float, longest_s: float) -> float:
    """`first_s` after the first failure, then twice as long each time, at most `longest_s`."""
    return min(first_s * 2.0 ** (failures - 1), longest_s)
