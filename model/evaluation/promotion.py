"""Which version of a registered model is the champion, and how it became it.

<root>/registry/<name>/000001.json and so on hold one promotion or rollback each. A record is only created if its number
has none yet, and holds the hash of the one before it: the second of two concurrent promotions fails, and an edited
record is detected. The alias `champion` in MLflow follows the last record.
"""

import getpass
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from model import registry, storage
from model.errors import ConfigError, DataError, StageError
from model.evaluation.gate import evaluation_of, judge
from model.evaluation.results import load_evaluation
from model.registry import Version


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One change of the champion."""

    number: int
    name: str
    action: str
    """"promote" or "rollback"."""
    before: str
    """Version of the former champion; empty for the first one."""
    to: str
    evaluation: str
    """URI of the evaluation by which the version passed the gate."""
    difference: str
    """To the former champion."""
    tolerance: float
    by: str
    time: str
    previous_sha256: str
    """Hash of the record before this one; empty for the first one."""


def promote(uri: str, version: Version, tolerance: float = 0.0) -> Promotion:
    """Makes a version the champion if it passes the gate.

    Raises StageError if it does not, or if another promotion was recorded meanwhile.
    """
    history = read_history(version)
    champion = _champion(uri, version.name, history)
    if champion and champion.number == version.number:
        raise ConfigError(f"{version.name} version {version.number} is the champion already.")
    verdict = judge(load_evaluation(evaluation_of(version)), champion, 0.0, tolerance)
    if verdict.problems:
        raise StageError("\n".join(verdict.problems))
    difference = str(verdict.difference or "there was no champion")
    return _record(uri, version, "promote", history, champion, difference=difference, tolerance=tolerance)


def promote_all(uri: str, references: Sequence[str], tolerance: float) -> None:
    """Promotes versions that are not champions yet."""
    for version in (registry.find_version(uri, reference) for reference in references):
        if registry.CHAMPION not in version.aliases:
            promote(uri, version, tolerance)


def rollback(uri: str, name: str) -> Promotion:
    """Makes the version before the champion the champion again."""
    history = read_history(registry.find_version(uri, name))
    champion, champions = _champion(uri, name, history), _champions(history)
    if champion is None:
        raise ConfigError(f"{name} has no champion.")
    if len(champions) < 2:
        raise ConfigError(f"{name} has had no champion before version {champion.number}.")
    before = registry.find_version(uri, f"{name}/{champions[-2]}")
    return _record(uri, before, "rollback", history, champion, difference="", tolerance=0.0)


def read_history(version: Version) -> list[Promotion]:
    """The records of a model, oldest first. Raises DataError if one was edited or removed."""
    folder, history, sha256 = _folder(version), list[Promotion](), ""
    for number, entry in enumerate(sorted(storage.walk(folder), key=lambda entry: entry.path), start=1):
        data = storage.read(storage.join(folder, entry.path))
        record = Promotion(**json.loads(data))
        if (record.number, record.previous_sha256) != (number, sha256):
            raise DataError(f"{folder}/{entry.path} must follow the record before it: a record was edited or removed.")
        history.append(record)
        sha256 = hashlib.sha256(data).hexdigest()
    return history


def _champion(uri: str, name: str, history: Sequence[Promotion]) -> Version | None:
    """The champion. Completes a promotion that was recorded, but interrupted before the alias was set."""
    if not history:
        return registry.find_champion(uri, name)
    found, recorded = registry.find_champion(uri, name), history[-1].to
    if found is None or found.number != recorded:
        registry.set_champion(uri, name, recorded)
    return registry.find_version(uri, f"{name}/{recorded}")


def _champions(history: Sequence[Promotion]) -> list[str]:
    """The versions that a rollback steps back through, the champion last."""
    stack: list[str] = []
    for record in history:
        if record.action == "rollback":
            stack.pop()
        else:
            stack = [*(stack or ([record.before] if record.before else [])), record.to]
    return stack


def _record(
    uri: str,
    version: Version,
    action: str,
    history: Sequence[Promotion],
    former: Version | None,
    *,
    difference: str,
    tolerance: float,
) -> Promotion:
    record = Promotion(
        number=len(history) + 1,
        name=version.name,
        action=action,
        before=former.number if former else "",
        to=version.number,
        evaluation=evaluation_of(version),
        difference=difference,
        tolerance=tolerance,
        by=getpass.getuser(),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        previous_sha256=hashlib.sha256(_encoded(history[-1])).hexdigest() if history else "",
    )
    where = storage.join(_folder(version), f"{record.number:06}.json")
    if not storage.create(where, _encoded(record)):
        raise StageError(f"the champion of {version.name} was changed at the same time, see {where}. Compare again.")
    registry.set_champion(uri, version.name, version.number)
    return record


def _encoded(record: Promotion) -> bytes:
    return json.dumps(asdict(record), ensure_ascii=False, indent=1).encode()


def _folder(version: Version) -> str:
    """Beside the models of the root that a version is in."""
    root, separator, _ = version.source.rpartition("/models/")
    if not separator:
        raise ConfigError(f"{version.source} must be below <root>/models/, where promotions are recorded.")
    return storage.join(root, "registry", version.name)
