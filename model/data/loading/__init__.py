"""From shards to batches, in an order that is computed."""
