"""The typed config: schema, YAML, overrides, help, errors. Never imports torch."""
