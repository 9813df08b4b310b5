"""`mplug doctor`: checks of this machine, of storage and MLflow, and of a cluster."""
