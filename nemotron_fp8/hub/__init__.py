"""Client of the Hugging Face Hub. ``huggingface_hub`` is imported on first use only."""
