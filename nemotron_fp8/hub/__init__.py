"""The Hugging Face Hub as source and as destination. ``huggingface_hub`` is imported on first use only."""
