"""Image classifiers, one file each: `python -m recipes.vision CONFIG`."""
