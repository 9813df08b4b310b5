"""The result of one check."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    kind: Literal["ok", "warning", "failure"]
    what: str
    said: str
    remedy: str = ""


def fine(what: str, said: str) -> Finding:
    return Finding("ok", what, said)


def warned(what: str, said: str, remedy: str) -> Finding:
    return Finding("warning", what, said, remedy)


def failed(what: str, said: str, remedy: str) -> Finding:
    return Finding("failure", what, said, remedy)
