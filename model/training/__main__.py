"""One process of a training run: `torchrun --nproc-per-node 2 -m model.training CONFIG [key=value …]`."""

import sys

from model.startup import quick_imports

with quick_imports():
    from model.config.load import load_config
    from model.errors import exit_codes
    from model.training.loop import run_training


def main() -> None:
    with exit_codes():
        run_training(load_config(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
