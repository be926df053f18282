"""Files as streams of bytes: plain or compressed, and never anything but a regular file.

    with open_file("docs.jsonl.gz") as file:      # .gz, .bz2, .xz, .zst, or plain
        ...

A pipe or a device named like a file would block a build forever, so only regular files are opened.
Whatever goes wrong in between (a truncated archive, a wrong checksum) is one exception of
READ_ERRORS, and `problem` puts it into words.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import zlib
from typing import IO, Any

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".lz4", ".7z", ".rar", ".tar", ".tgz")


def open_file(path: str) -> IO[bytes]:
    """The contents of `path`, decompressed if its name says so.

    Raises one of READ_ERRORS for anything but a readable regular file, and ValueError, naming the
    package, if a library for its compression is missing.
    """
    raw = _open_regular(path)
    try:
        suffix = os.path.splitext(path.lower())[1]
        if suffix == ".gz":
            return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
        if suffix == ".bz2":
            return bz2.BZ2File(raw)
        if suffix == ".xz":
            return lzma.LZMAFile(raw)
        if suffix == ".zst":
            return io.BufferedReader(_Zstandard(_zstandard_stream(raw, path)), 1 << 20)
    except BaseException:
        raw.close()
        raise
    return raw


def is_compressed(path: str) -> bool:
    """Whether `open_file` decompresses it: such a file can only be read from its start."""
    return path.lower().endswith(COMPRESSED)


def inner_suffix(path: str) -> str:
    """The suffix without the one of the compression: ".jsonl" of data.jsonl.gz."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def check_not_archive(path: str) -> None:
    """Raise ValueError for a file that must be unpacked first."""
    if path.lower().endswith(ARCHIVES) or inner_suffix(path) in ARCHIVES:
        raise ValueError(
            f"{path} is an archive: unpack it first; compressed with {', '.join(COMPRESSED)}, "
            "single files are read as they are"
        )


def file_state(path: str) -> tuple[str, int, int]:
    """(absolute path, size, modification time): changes whenever the contents may have changed."""
    try:
        state = os.stat(path)
    except OSError:
        return os.path.abspath(path), 0, 0
    return os.path.abspath(path), state.st_size, state.st_mtime_ns


def problem(error: BaseException) -> str:
    """One of READ_ERRORS in words, on one line."""
    if isinstance(error, EOFError):
        return "it ends early: truncated"
    if isinstance(error, OSError):
        return " ".join(str(error.strerror or error).split())
    return "damaged: " + " ".join(str(error).split())


def _open_regular(path: str) -> IO[bytes]:
    # Opening a pipe blocks until something writes to it; O_NONBLOCK opens it, and fstat tells.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"not a regular file: {kind_of(path)}")
    return os.fdopen(fd, "rb")


def kind_of(path: str) -> str:
    """What a path that is not a regular file is."""
    mode = os.stat(path).st_mode
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a folder",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def _zstandard_stream(raw: IO[bytes], path: str) -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        pass
    else:
        return zstd.ZstdFile(raw)
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"reading {path} requires the package `zstandard`: pip install zstandard"
        ) from None
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


class _Zstandard(io.RawIOBase):
    """A Zstandard stream whose errors are OSErrors, as those of the other compressions."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except (OSError, EOFError):
            raise
        except Exception as error:  # classes of the two libraries
            raise OSError(f"damaged: {error}") from error

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
