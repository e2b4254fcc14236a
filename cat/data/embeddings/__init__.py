"""External embeddings of a data set: one memory-mapped ``.npy`` (rows, D_e) and a small JSON beside it.

A row never parts from its clip: the manifest names each clip's row and the fingerprint of the list that the rows were
computed for, and both are checked when the file is opened. The JSON also says what made the rows, their SHA-256, all in
all and piece by piece, and of some clips size and content (`cat.data.verification`); `EmbeddingStore.verify` compares.
The released layout, one ``.npy`` a clip, is read too.
"""

from cat.data.embeddings.reading import EmbeddingFiles, EmbeddingStore, open_embeddings
from cat.data.embeddings.sidecar import EmbeddingError, read_sidecar, sidecar_path
from cat.data.embeddings.writing import EmbeddingWriter, gather_embeddings

__all__ = [
    "EmbeddingError",
    "EmbeddingFiles",
    "EmbeddingStore",
    "EmbeddingWriter",
    "gather_embeddings",
    "open_embeddings",
    "read_sidecar",
    "sidecar_path",
]
