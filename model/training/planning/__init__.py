"""What a run needs, before it is launched."""
