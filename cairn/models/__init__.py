"""The transformer and the models configured from it."""
