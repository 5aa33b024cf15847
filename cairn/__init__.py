"""cairn: a distributed pretraining stack. The shared core; see docs/architecture.md for its floors."""

__version__ = "0.1.0"
