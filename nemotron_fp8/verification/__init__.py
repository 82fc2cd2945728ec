"""Verify a result, alone or against its source."""
