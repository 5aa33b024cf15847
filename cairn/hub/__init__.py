"""To and from `transformers` folders."""
