"""NeMo checkpoints as a source: Nemotron-4 as published, in the names and shapes of Hugging Face.

Only headers are read: ``.zarray``, the headers of a tar and of ``.distcp`` files locate every element.
"""
