"""Writes and reads tar shards. Every clip is decoded once, when its shard is written."""
