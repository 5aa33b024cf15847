"""Tests on a real SLURM."""
