# SPDX-License-Identifier: BSD-3-Clause
"""NNCodec (Fraunhofer HHI, ISO/IEC 15938-17) as a peer: its coder without its data-driven tools."""

import os
import sys
import tempfile
from unittest.mock import MagicMock

_ONLY_FOR_DATA = ("torchvision", "cv2", "flwr", "wandb", "sentencepiece", "h5py")


def load_nncodec():
    """Return ``(compress, decompress)``; packages that only its training tools use need not be installed."""
    while True:
        try:
            from nncodec import nnc
        except ModuleNotFoundError as error:
            if error.name not in _ONLY_FOR_DATA:
                raise
            sys.modules[error.name] = MagicMock()
            for name in [n for n in sys.modules if n.split(".")[0] == "nncodec"]:
                del sys.modules[name]
        else:
            return _compress(nnc.compress), nnc.decompress


def _compress(compress):
    def compress_to_bytes(tensors, **options):
        """The bitstream; NNCodec also writes it to a file, which goes to a folder that is removed."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "stream.nnc")
            stream = compress(tensors, bitstream_path=path, return_bitstream=True, verbose=False, **options)
        return stream  # a bytearray: `decompress` takes nothing else

    return compress_to_bytes
