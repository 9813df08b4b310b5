"""One process of an evaluation: `torchrun --nproc-per-node 2 -m model.evaluation REQUEST`.

`mplug evaluate` calls it. REQUEST is a Request as JSON.
"""

import json
import sys

from model.startup import quick_imports

with quick_imports():
    from model.config.schema import WatchdogConfig
    from model.distributed import Processes, processes
    from model.errors import exit_codes
    from model.evaluation.runner import Request, evaluate


def evaluate_and_print(request: Request, group: Processes) -> None:
    """Prints the protocol of an evaluation to standard error and its scores, as JSON, to standard output."""
    for evaluation in evaluate(request, group):
        print(evaluation.protocol_line, file=sys.stderr)
        for name, value in evaluation.scores.items():
            low, high = evaluation.intervals[name]
            print(f"{name}: {value:.4f}, 95 % of resampled splits in {low:.4f} to {high:.4f}", file=sys.stderr)
        print(json.dumps(evaluation.scores, indent=1))


def main() -> None:
    with exit_codes(), processes(WatchdogConfig()) as group:
        evaluate_and_print(Request(**json.loads(sys.argv[1])), group)


if __name__ == "__main__":
    main()
