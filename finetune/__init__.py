"""Downstream tasks and custom data: `python -m finetune CONFIG`."""
