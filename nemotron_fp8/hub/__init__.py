"""The Hugging Face Hub as a source and as a destination. ``huggingface_hub`` is imported on first use only."""
