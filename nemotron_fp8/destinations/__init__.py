"""Destinations: folders, shared storage and Hub repositories that receive a result."""
