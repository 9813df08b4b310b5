"""From published clips to batches: annotations, download, shards, sampling, loading."""
