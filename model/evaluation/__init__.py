"""Evaluates trained models: scores, gate, registration, report."""
