"""The training loop and what it stands on: engine, optimizer, tracking. `torchrun -m model.training CONFIG` runs it."""
