"""Steps wired into pipelines, and the command line `mplug`."""
