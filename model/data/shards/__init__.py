"""Clips, decoded once and stored in tar shards that training reads."""
