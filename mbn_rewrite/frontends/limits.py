"""Limits on the size of what is read from model files.

Each lies far above what a real model has; a file that exceeds one was made to exhaust memory or
time. All are checked before anything is read.
"""

MB = 2**20

# A configuration is JSON: the largest of known networks have 2 MB, vocabularies of a million
# words 15 MB. Parsed it takes up to thirty times as much memory.
CONFIG_BYTES = 32 * MB
METADATA_BYTES = MB
# A model within a model adds about ten levels.
CONFIG_DEPTH = 400
# A .keras file has three members, and some for each layer with a vocabulary.
ARCHIVE_MEMBERS = 20_000
# Weights may be compressed, and pruned ones compress well; archives that expand further than this
# hold next to nothing.
EXPANDED_BYTES = 4096 * MB
EXPANSION = 50
# Far more objects than any network has layers.
HDF5_OBJECTS = 500_000
# Protocol buffers are not read beyond this.
GRAPH_BYTES = 2048 * MB - 1
GRAPH_TEXT_BYTES = 512 * MB
# Functions that call functions multiply when calls are inlined.
INLINED_NODES = 20_000_000


def is_bomb(packed: int, expanded: int) -> bool:
    """Whether an archive, by its size packed and expanded, was made to exhaust memory."""
    return expanded > EXPANDED_BYTES and expanded > EXPANSION * packed
