"""Judging trained models: metrics, figures and the report."""
