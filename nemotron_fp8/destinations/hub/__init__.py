"""Publish a result to a Hugging Face Hub repository."""
