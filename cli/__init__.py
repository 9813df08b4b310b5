"""The command line `mplug`. Each command is a call into pipelines, components or model."""
