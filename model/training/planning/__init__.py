"""Estimates the resources of a run before it is launched."""
