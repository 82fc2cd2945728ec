"""Run a plan: from a source through an engine to a destination."""
