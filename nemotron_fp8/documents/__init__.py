"""The small files of a result: config, index, manifest, model card, statistics."""
