"""Sources: local folders, the Hugging Face Hub, NeMo checkpoints."""
