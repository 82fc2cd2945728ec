"""Running a model layer by layer: one decoder layer of a checkpoint in memory at a time."""
