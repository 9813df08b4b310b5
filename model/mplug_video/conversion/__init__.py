"""Converts published weights into folders that transformers can load."""
