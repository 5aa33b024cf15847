"""What a model is trained to predict: samples and losses."""
