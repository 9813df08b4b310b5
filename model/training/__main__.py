"""One process of a training run: `torchrun --nproc-per-node 2 -m model.training CONFIG [key=value …]`."""

import sys

from model.config.load import load_config
from model.errors import exit_codes
from model.training.loop import train


def main() -> None:
    with exit_codes():
        train(load_config(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
