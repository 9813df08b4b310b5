"""The configuration of a run: its fields, its YAML files, and what can be wrong with them."""
