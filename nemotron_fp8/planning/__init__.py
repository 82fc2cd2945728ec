"""Decisions about every tensor of a conversion: pure data, without torch and network."""
