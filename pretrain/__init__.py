"""Preparing corpora and pretraining language models: `python -m pretrain CONFIG`."""
