"""Shards over several machines: the jobs of a conversion as tasks of a Ray cluster. Needs the extra ``[ray]``."""
