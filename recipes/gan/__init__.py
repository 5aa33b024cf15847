"""Generative adversarial networks, one file each: `python -m recipes.gan CONFIG`."""
