"""Evaluation of results: source and results run layer by layer on the same text, and are compared."""
