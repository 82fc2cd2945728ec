"""Worker pools: this process, one process per device, or a Ray cluster."""
