"""The configuration of a run: fields, YAML files, problems."""
