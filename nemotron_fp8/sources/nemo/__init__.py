"""NeMo checkpoints as a source: Nemotron-4 as it was published, in the names and shapes of Hugging Face.

Headers only, as everywhere: ``.zarray``, the directory of a tar or of a ``.distcp`` file say where every
element lies, and the rest of the library reads it from there.
"""
