"""Checkpoints as data: tensor headers, dtypes, the inventory of files. No torch, no network."""
