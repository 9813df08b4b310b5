"""Partitions of work, written as i/n."""

from model.errors import ConfigError


def parse_partition(text: str) -> tuple[int, int]:
    """ "2/8" -> (1, 8)"""
    part, separator, count = text.partition("/")
    if not (separator and part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise ConfigError(f"a partition must be i/n with i from 1 to n, got {text}.")
    return int(part) - 1, int(count)
