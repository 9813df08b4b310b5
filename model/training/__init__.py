"""Training: launch, loop, engine, checkpoints, planning. `torchrun -m model.training CONFIG` runs one process."""
