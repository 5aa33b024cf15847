"""Attention and its backends, masks, positions, losses: the only floor that names a kernel library."""
