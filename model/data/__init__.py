"""From published clips to batches: download, shards, loading."""
