"""Workers on a Ray cluster: one task for each shard. Needs the extra ``[ray]``."""
