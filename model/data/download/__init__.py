"""Published datasets, copied into object storage."""
