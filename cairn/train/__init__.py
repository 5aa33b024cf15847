"""The engine, the one training loop, checkpoints and tracking."""
