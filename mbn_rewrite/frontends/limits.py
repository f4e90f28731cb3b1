"""How large what is read of a model's files may be.

Each limit lies far above what a real model has; what exceeds it was made to exhaust memory or
time. All are checked before anything is read.
"""

MB = 2**20

# A configuration is JSON: the largest of known networks have 2 MB, vocabularies of a million
# words 15 MB. Parsed it takes up to thirty times as much memory.
CONFIG_BYTES = 32 * MB
METADATA_BYTES = MB
# Models in models are about ten levels each.
CONFIG_DEPTH = 400
# A .keras file has three members, and some for each layer with a vocabulary.
ARCHIVE_MEMBERS = 20_000
# Weights may be compressed, those that were pruned well; what expands to more than this
# is all but empty.
EXPANDED_BYTES = 4096 * MB
EXPANSION = 50
# More objects than layers of any network.
HDF5_OBJECTS = 500_000
# Protocol buffers are not read beyond this.
GRAPH_BYTES = 2048 * MB - 1
GRAPH_TEXT_BYTES = 512 * MB
# Functions that call functions multiply when calls are inlined.
INLINED_NODES = 20_000_000


def is_bomb(packed: int, expanded: int) -> bool:
    """Whether so many bytes that expand to so many others were made to exhaust memory."""
    return expanded > EXPANDED_BYTES and expanded > EXPANSION * packed
