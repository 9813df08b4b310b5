"""The command line `mplug`. Each command is a call into the packages below."""
