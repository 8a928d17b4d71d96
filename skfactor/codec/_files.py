"""Files that are whole or not there: written beside their place and renamed into it; open files the same way."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["AtomicFile", "OpenFile"]


class AtomicFile:
    """A binary file that appears at `path` only when `commit` is called.

    It is written as a hidden temporary file in the same folder, so that the rename is atomic; what stood at `path`
    stays whole until then, whatever happens. `abort`, or leaving a `with` block by an exception, removes it. A
    process that is killed leaves the temporary file `.<name>.<random>.tmp` behind and nothing else.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> target = os.path.join(folder.name, "a.bin")
    >>> with AtomicFile(target) as file:
    ...     _ = file.write(b"abc")
    >>> open(target, "rb").read(), os.listdir(folder.name)
    (b'abc', ['a.bin'])
    >>> folder.cleanup()
    """

    def __init__(self, path):
        # a symbolic link stays one: the file it points to is replaced
        self.path = Path(os.path.realpath(path))
        if self.path.is_dir():
            raise IsADirectoryError(f"cannot write a file at {os.fspath(path)!r}: it is a folder")
        self._temporary = self.path.with_name(f".{self.path.name[:200]}.{secrets.token_hex(6)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "w+b")
        self.write, self.seek, self.tell, self.read, self.truncate = (
            self._file.write, self._file.seek, self._file.tell, self._file.read, self._file.truncate)

    def commit(self):
        """Flush to disk and rename into place."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self.path.exists():
                os.chmod(self._temporary, self.path.stat().st_mode & 0o7777)
            os.replace(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise
        with contextlib.suppress(OSError):  # the rename itself reaches the disk; not every system can sync a folder
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def abort(self):
        """Remove the temporary file; what stood at `path` is untouched."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.commit()
        else:
            self.abort()


class OpenFile:
    """A file object of the caller behind the methods of `AtomicFile`; it stays open, and `abort` empties it."""

    def __init__(self, file):
        self._file = file
        self.write, self.seek, self.tell, self.read, self.truncate = (
            file.write, file.seek, file.tell, file.read, file.truncate)

    def commit(self):
        """Flush."""
        self._file.flush()

    def abort(self):
        """Remove what was written."""
        self._file.seek(0)
        self._file.truncate()
