"""Bytes of the library, on any fsspec file system: blobs named by their SHA-256, and small sealed records.

    blobs/ab/abcdef...          a file of an adapter, by its content
    manifests/NAME/3.json       what version 3 is (sealed: see manifest.py)
    manifests/NAME/state.json   aliases, history, demands
    tmp/                        private copies of writers at work

A blob appears under its name whole or not at all: it is copied aside, hashed there, and renamed. On an object store a
write is published when it is closed, so the rename is not needed. Reading checks the hash, always. Files are put in
place first and flushed together afterwards (`settle`), because a journal that is flushed once costs a fraction of
one that is flushed for every name.

The surprise: a writer holds a lock on its folder in tmp/, which the system drops when the writer dies. So `gc` knows
the folders of killed writers from those at work, without guessing by age.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import posixpath
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from veneer.errors import FormatError, NotFound, ResourceError
from veneer.files import FULL, replacing, sync

DIGEST = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 18  # stays in a core's cache between reading and writing


class Blobs:
    """The files of one library under `root` of an fsspec file system."""

    def __init__(self, file_system: Any, root: str) -> None:
        from fsspec.implementations.local import LocalFileSystem

        self.file_system = file_system
        self.root = root.rstrip("/")
        self.is_local = isinstance(file_system, LocalFileSystem)

    def path(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    def blob_path(self, digest: str) -> str:
        """Where a blob lives. Anything but a SHA-256 is refused: a damaged record can't lead outside the library."""
        if DIGEST.fullmatch(digest) is None:
            raise FormatError(f"{digest[:80]!r} is not a SHA-256")
        return self.path("blobs", digest[:2], digest)

    # Writing

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A private local folder (beside the blobs where they are local), gone afterwards."""
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="veneer-") as scratch:
                yield Path(scratch)
            return
        folder, handle = self._locked_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private local folder for reading: in the system's own tmp where this library cannot be written."""
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(self.staging())
            except ResourceError:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-")))
            yield folder

    def _locked_folder(self) -> tuple[Path, int]:
        while True:
            folder = Path(self.path("tmp", uuid.uuid4().hex))
            with writing(f"the library at {self.root}"):
                folder.mkdir(parents=True, mode=0o700)
                handle = os.open(folder, os.O_RDONLY)
            _lock(handle)
            if folder.exists():  # gc may have come between mkdir and lock
                return folder, handle
            os.close(handle)

    def copy_in(self, source: Path, target: Path) -> None:
        """Copy a regular file to a staged path. Links, pipes and devices are refused."""
        with open_regular(source) as reader, writing(f"the library at {self.root}"):
            opener = self.file_system.open if self.is_local else open
            with opener(str(target), "wb") as writer:
                shutil.copyfileobj(reader, writer, CHUNK)

    def publish(self, staged: Path, digest: str) -> str | None:
        """Make a staged, flushed file a blob, and return its path for `settle`; None where it is a blob already.

        A blob of another size is damage, and is replaced.
        """
        final, size = self.blob_path(digest), staged.stat().st_size
        if self.size(final) == size:
            return None
        with writing(f"the library at {self.root}"):
            if not self.is_local:
                with open(staged, "rb") as reader, self.file_system.open(final, "wb") as writer:
                    shutil.copyfileobj(reader, writer, CHUNK)
                return final
            staged.chmod(0o444)
            Path(final).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, final)
        return final

    def settle(self, paths: Iterable[str]) -> None:
        """Wait until files that were put in place, and the two folders above each, are on the disk.

        Name first what has bytes that are not flushed yet: on most file systems its flush takes all the names along.
        """
        if not self.is_local:
            return
        files = [Path(path) for path in paths]
        folders = dict.fromkeys(folder for file in files for folder in (file.parent, file.parent.parent))
        with writing(f"the library at {self.root}"):
            for path in (*files, *folders):
                sync(path)

    def write(self, path: str, content: bytes, *, durable: bool = True) -> None:
        """Put a small file in place at once, and flush it if it is to be `durable` now. Only under the catalogue's write lock."""
        with writing(f"the library at {self.root}"):
            if not self.is_local:
                self.file_system.pipe_file(path, content)
                return
            with replacing(Path(path), durable=durable) as beside, self.file_system.open(str(beside), "wb") as writer:
                writer.write(content)

    def delete(self, path: str) -> None:
        """Delete a file; one that is gone already is as good."""
        with contextlib.suppress(FileNotFoundError), writing(f"the library at {self.root}"):
            self.file_system.rm_file(path)

    # Reading

    def size(self, path: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        try:
            return int(os.stat(path).st_size if self.is_local else self.file_system.info(path)["size"])
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes:
        """A small file whole, or NotFound."""
        try:
            content: bytes = self.file_system.cat_file(path)
        except FileNotFoundError as error:
            raise NotFound(f"{path} is not there", help="`veneer library verify` lists all that is missing") from error
        return content

    def check(self, digest: str) -> int:
        """Read a blob to its end and return its size; FormatError where the bytes are not those that were added."""
        if not self.is_local:
            return self._hashed(digest, lambda _: None)
        path = Path(self.blob_path(digest))
        try:
            found, size = digest_of(path), path.stat().st_size
        except FileNotFoundError as error:
            raise _missing(digest, self.root) from error
        return _proved(digest, found, size)

    def is_intact(self, digest: str) -> bool:
        """Whether the blob is there and its bytes are those that were added."""
        try:
            self.check(digest)
        except (FormatError, NotFound):
            return False
        return True

    def link(self, digest: str, target: Path) -> None:
        """A checked blob of a local store under another name; a copy where the system allows no link to it."""
        try:
            os.link(self.blob_path(digest), target)
        except FileNotFoundError as error:
            raise _missing(digest, self.root) from error
        except OSError:  # another device, another owner, or a file system without links
            self.copy_out(digest, target)
        else:
            self.check(digest)

    def copy_out(self, digest: str, target: Path) -> None:
        """A checked copy of a blob that the caller may write to."""
        with writing(str(target.parent)), open(target, "wb") as writer:
            self._hashed(digest, writer.write)

    def _hashed(self, digest: str, sink: Callable[[bytes], Any]) -> int:
        """Bytes of a blob that hash to its name; `sink` takes them as they come."""
        hasher, size = hashlib.sha256(), 0
        try:
            with self.file_system.open(self.blob_path(digest), "rb") as reader:
                while chunk := reader.read(CHUNK):
                    hasher.update(chunk)
                    sink(chunk)
                    size += len(chunk)
        except FileNotFoundError as error:
            raise _missing(digest, self.root) from error
        return _proved(digest, hasher.hexdigest(), size)

    # Listing, for gc, verify and rebuild

    def files(self, kind: str) -> dict[str, int]:
        """Every file under `blobs` or `manifests`: path -> bytes."""
        try:
            found = self.file_system.find(self.path(kind), detail=True)
        except FileNotFoundError:
            return {}
        return {path: int(info["size"] or 0) for path, info in found.items()}

    def abandoned(self) -> list[Path]:
        """Folders of writers that died. Empty on a store that is not local: those stage in the system's own tmp."""
        if not self.is_local or not os.path.isdir(self.path("tmp")):
            return []
        return [folder for folder in Path(self.path("tmp")).iterdir() if _is_abandoned(folder)]


_RESTORE = "add the adapter again (it gets the same version and heals the blob), or restore the file from a backup"


def _missing(digest: str, root: str) -> NotFound:
    return NotFound(f"blob {digest} is missing from {root}", help=_RESTORE)


def _proved(digest: str, found: str, size: int) -> int:
    """The size, where what was found is what was added."""
    if found != digest:
        raise FormatError(f"blob {digest} is damaged: its {size} bytes hash to {found}", help=_RESTORE)
    return size


def digest_of(path: Path) -> str:
    """SHA-256 of a local file that nobody changes. One call over its mapping: other threads run meanwhile."""
    with open(path, "rb") as reader:
        if os.fstat(reader.fileno()).st_size == 0:
            return hashlib.sha256().hexdigest()
        with mmap.mmap(reader.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def open_regular(path: Path) -> Any:
    """Open a regular file for reading. A symbolic link, pipe, device or folder is a FormatError; nothing is followed."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError as error:
        raise NotFound(f"{path} is not there") from error
    except OSError as error:
        if path.is_symlink():
            raise FormatError(
                f"{path} is a symbolic link",
                help="give the library the files themselves: cp -rL SOURCE COPY, then add COPY",
            ) from error
        raise FormatError(f"{path} cannot be read: {error.strerror}", help="check its owner and mode") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(f"{path} is not a regular file", help="an adapter's files are plain files")
    return os.fdopen(handle, "rb")


@contextlib.contextmanager
def writing(place: str) -> Iterator[None]:
    """Turn what the system says about a failed write into a ResourceError; nothing half-written has a name."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(
                f"no space left for {place}: {error.strerror}",
                help="free some space (`veneer library gc` deletes what no version needs) and try again; nothing was changed",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(
                f"{place} cannot be written: {error.strerror}", help="check its owner and mode"
            ) from error
        raise


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_abandoned(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(handle)
    finally:
        os.close(handle)
