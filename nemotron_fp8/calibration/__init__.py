"""Calibration of a source: amaxes of its activations, measured layer by layer on a text."""
