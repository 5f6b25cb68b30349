"""Where a library is: `FOLDER`, `URL`, or `URL#DATABASE`.

A local folder keeps its catalogue in `catalogue.sqlite` inside it. A store elsewhere (`s3://bucket/adapters`) needs a
database that its users share, written after `#`: `s3://bucket/adapters#postgresql+psycopg://host/veneer`.

Nothing is made by looking: a place without a library is NotFound until something is added. A place whose files are
there and whose catalogue is not says so and never starts an empty one over them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from veneer.errors import ConfigError, Conflict, NotFound, VeneerError
from veneer.library.blobs import Blobs, writing
from veneer.library.catalogue import Catalogue, parse_url, place_new, sqlite_path, sqlite_url
from veneer.library.migrations import schema_version

FILE = "catalogue.sqlite"


@dataclass(frozen=True)
class Place:
    """The blobs and the database URL of one library."""

    blobs: Blobs
    database: URL

    def open(self, *, create: bool = False) -> Catalogue:
        """The catalogue, upgraded. With `create`, an empty one where there is no library yet."""
        path = sqlite_path(self.database)
        if path is not None and not path.exists():
            self._missing(create)
            return self.build(path)
        catalogue = Catalogue(self.database)
        if not _has_schema(catalogue):
            self._missing(create)
        catalogue.upgrade()
        return catalogue

    def build(self, path: Path) -> Catalogue:
        """A new SQLite catalogue at `path`; where another process is first, theirs."""
        with writing(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self.blobs.staging() as folder:
            aside = new_sqlite(folder)
            aside.close()
            place_new(path, folder / FILE)
        return Catalogue(self.database)

    def _missing(self, create: bool) -> None:
        if self.blobs.files("manifests"):
            raise NotFound(
                f"the catalogue of the library {self.blobs.root} is gone ({self.database!r}); its adapters are there",
                help="make it again from their manifests: `veneer library rebuild`",
            )
        if not create:
            raise NotFound(
                f"there is no library at {self.blobs.root}",
                help="`veneer library add` makes one; check the path otherwise",
            )

    def set_aside_damaged(self) -> list[str]:
        """Move a damaged SQLite catalogue out of the way; Conflict where it is sound. What was moved is returned."""
        path = sqlite_path(self.database)
        if path is None:
            if _has_schema(Catalogue(self.database)):
                raise Conflict(f"the catalogue {self.database!r} has tables", help="empty that database first")
            return []
        if path.exists() and self._is_sound():
            raise Conflict(
                f"the catalogue {path} is sound", help="`veneer library verify` says what is wrong with the files"
            )
        moved: list[str] = []
        for old in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            if old.exists():
                kept = next(p for n in range(1, 1000) if not (p := old.with_name(f"{old.name}.damaged-{n}")).exists())
                with writing(str(old)):
                    old.rename(kept)
                moved.append(kept.name)
        return moved

    def _is_sound(self) -> bool:
        catalogue = Catalogue(self.database)
        try:
            return _has_schema(catalogue) and not catalogue.problems()
        except VeneerError:
            return False
        finally:
            catalogue.close()


def find_place(url: str | os.PathLike[str]) -> Place:
    """The place that a folder or URL names. Nothing is touched."""
    from fsspec.core import url_to_fs

    where, _, database = os.fspath(url).partition("#")
    if not where:
        raise ConfigError("a library needs a folder or a URL", help="--library adapters")
    try:
        file_system, root = url_to_fs(where)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"'{where}' is not a folder or a URL that can be opened: {error}") from error
    blobs = Blobs(file_system, root)
    if not database and not blobs.is_local:
        raise ConfigError(
            f"the library {where} is not a local folder and needs a database for its catalogue",
            help=f"write it after a '#': {where}#postgresql+psycopg://host/veneer",
        )
    return Place(blobs, parse_url(database) if database else sqlite_url(blobs.path(FILE)))


def new_sqlite(folder: Path) -> Catalogue:
    """An empty, current catalogue in `folder`, to be filled and linked into place."""
    catalogue = Catalogue(sqlite_url(folder / FILE))
    catalogue.upgrade()
    return catalogue


def _has_schema(catalogue: Catalogue) -> bool:
    with catalogue.read() as connection:
        return schema_version(connection) > 0


def discard(folder: Path) -> None:
    """Delete an abandoned staging folder."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
