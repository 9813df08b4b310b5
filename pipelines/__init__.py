"""Pipelines of KFP components, and what runs them: the local runner and Kubeflow Pipelines."""
