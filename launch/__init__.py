"""The front door: the `cairn` command."""
