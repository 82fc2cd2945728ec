"""Turn huge Hugging Face checkpoints into FP8: streaming, exact, at bounded memory."""
