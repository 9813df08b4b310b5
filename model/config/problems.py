"""Turns validation errors into messages that use the keys of the configuration file."""

import difflib
from functools import partial
from typing import Any

from pydantic import BaseModel


def explain(item: Any, root: type[BaseModel]) -> list[str]:
    """One pydantic error as lines: the key, the rule, the value."""
    key = ".".join(str(part) for part in item["loc"] if not _is_union_arm(part))
    match item["type"]:
        case "extra_forbidden":
            section = item["input"] if isinstance(item["input"], dict) else {}
            leaves = [f"{key}.{leaf}" for leaf in section] or [key]
            return [f"{leaf} is not a known key. The nearest is {_nearest(leaf, root)}." for leaf in leaves]
        case "value_error":
            return str(item["ctx"]["error"]).splitlines()
        case _ if _is_union_arm(item["loc"][-1]):
            return [f"{key}: input should be a number, a boolean or a string, got {item['input']!r}."]
        case _:
            return [f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}."]


def _nearest(key: str, root: type[BaseModel]) -> str:
    return max(_known_keys(root), key=partial(_likeness, key))


def _likeness(key: str, known: str) -> float:
    """Similarity of two dotted keys. The last part has the same weight as the whole key."""
    pairs = (key, known), (key.rpartition(".")[2], known.rpartition(".")[2])
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)


def _is_union_arm(part: str | int) -> bool:
    return part in {"int", "float", "bool", "str"}  # pydantic adds the member of a union to the path


def prune(tree: dict[str, Any], problems: list[Any]) -> bool:
    """Removes the values that caused the problems; False if there was nothing to remove."""
    removed = False
    for problem in problems:
        path = [part for part in problem["loc"] if not _is_union_arm(part)]
        while path and isinstance(path[-1], int):
            path.pop()  # an item of a list: remove the whole list
        section = tree
        for part in path[:-1]:
            section = section.get(part, {})
        if path and path[-1] in section:
            del section[path[-1]]
            removed = True
    return removed


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
