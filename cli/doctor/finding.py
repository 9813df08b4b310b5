"""The result of one check."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    kind: Literal["ok", "warning", "failure"]
    check: str
    message: str
    remedy: str = ""


def fine(check: str, message: str) -> Finding:
    return Finding("ok", check, message)


def warned(check: str, message: str, remedy: str) -> Finding:
    return Finding("warning", check, message, remedy)


def failed(check: str, message: str, remedy: str) -> Finding:
    return Finding("failure", check, message, remedy)
