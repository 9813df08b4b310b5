"""The synthetic corpus of demo and tests."""
