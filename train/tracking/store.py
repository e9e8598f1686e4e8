"""MLflow's stores: opening them, and an embedded one that another version of MLflow wrote.

A newer MLflow changes the schema of an SQLite store for good, and an older one cannot open it afterwards. So
a store is copied before it is changed, and a newer one's is refused in a line that names the way back.
"""

import contextlib
import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from train.recipe.errors import UserError
from train.record import log

SQLITE = "sqlite:///"
COPY = ".schema-"
"""Between the names of a store and of its schema, in the name of the copy before a change."""

LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of addresses of artifacts, of all versions of MLflow."""

logger = log.get_logger("train.tracking")

# MLflow 3 reports its use to its makers, and asks at its import. Records are only for the tracking server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def connect(uri: str, artifacts: Path) -> Any:
    """Returns a client; first creates an embedded store, or brings it to this MLflow's schema.

    That takes seconds, one process at a time.

    Args:
        uri: the tracking server or store.
        artifacts: folder for the artifacts of a new embedded store.

    Raises:
        UserError: if a newer MLflow wrote the embedded store, or it cannot be copied or changed.
    """
    from mlflow import MlflowClient

    if uri.startswith(SQLITE):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        store = Path(uri.removeprefix(SQLITE))
        with exclusive(store.with_suffix(".lock")):
            take_over(store)
            relocate(store, artifacts)
            SqlAlchemyStore(uri, str(artifacts))
    elif urlsplit(uri).scheme in ("", "file"):
        # MLflow 3 maintains folders of files but opens them only on demand; whoever names one demands it.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=uri)
    # MLflow creates a folder for its default experiment in the working directory.
    with contextlib.suppress(OSError):
        Path("mlruns").rmdir()
    return client


def take_over(store: Path) -> None:
    """Brings an older MLflow's SQLite store to this one's schema, after a warning and a copy.

    To be called under the store's lock. A store that does not exist or is empty is left to MLflow.

    Raises:
        UserError: if a newer MLflow wrote it, or it cannot be copied or changed.
    """
    found = schema_of(store)
    if not found:
        return
    newest, known = _schemas()
    here = f"MLflow {version('mlflow')}"
    if found not in known:
        raise UserError(f"{store} was written by a newer MLflow than {here}", remedy=_way_back(store, known))
    if found == newest:
        return
    copy = store.with_name(f"{store.name}{COPY}{found}")
    logger.warning(
        f"tracking: {store} was written by an older MLflow; {here} now changes it for good "
        f"(schema {found} to {newest}), and the older one can then open only the copy, {copy}"
    )
    _copy(store, copy)
    from mlflow.db import upgrade

    try:
        upgrade.main([f"{SQLITE}{store}"], standalone_mode=False)
    except Exception as error:  # A migration may raise anything.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{store} cannot be changed ({type(error).__name__}: {reason})",
            remedy=f"{copy} is as it was before",
        ) from error


def relocate(store: Path, artifacts: Path) -> None:
    """Leads an embedded store that was moved or copied with its runs to the artifacts next to it.

    MLflow keeps absolute addresses. To be called under the store's lock.

    Args:
        store: the store.
        artifacts: the folder next to it.

    Raises:
        UserError: if the store cannot be changed.
    """
    if not schema_of(store):
        return
    here = {"": str(artifacts), "file://": artifacts.as_uri()}
    ours = re.compile(rf"((?:file://)?)(/.*?/{re.escape(artifacts.name)})(?:/|$)")
    try:
        with contextlib.closing(sqlite3.connect(store)) as database, database:
            columns = [
                (table, column)
                for table, column in LOCATIONS
                if column in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            ]
            for table, column in columns:
                found = database.execute(f"SELECT DISTINCT {column} FROM {table}")
                for (location,) in found.fetchall():
                    match = ours.match(location or "")
                    if match and match[1] + match[2] != here[match[1]]:
                        moved = here[match[1]] + location[match.end(2) :]
                        sql = f"UPDATE {table} SET {column} = ? WHERE {column} = ?"
                        database.execute(sql, (moved, location))
    except sqlite3.Error as error:
        raise UserError(f"{store} cannot be changed ({error})") from None


def schema_of(store: Path) -> str:
    """Returns the revision of a store's schema; an empty string if it has none yet.

    Raises:
        UserError: if the file is not a database.
    """
    if not store.is_file():
        return ""
    try:
        with contextlib.closing(_open_to_read(store)) as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE name = 'alembic_version'")
            rows = database.execute("SELECT version_num FROM alembic_version") if tables.fetchone() else ()
            return "".join(revision for (revision,) in rows)
    except sqlite3.Error as error:
        raise UserError(f"{store} cannot be read as an SQLite store ({error})") from None


def tagged_experiments(store: Path, tag: str) -> list[tuple[int, str]]:
    """Returns number and name of each experiment of an SQLite store that has a tag and was not deleted."""
    with contextlib.closing(_open_to_read(store)) as database:
        found = database.execute(
            "SELECT experiment_id, name FROM experiments JOIN experiment_tags USING (experiment_id) "
            "WHERE key = ? AND lifecycle_stage = 'active' ORDER BY experiment_id",
            (tag,),
        )
        return found.fetchall()


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock file; the system releases it if the process dies.

    Raises:
        BlockingIOError: if ``wait`` is false and another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _schemas() -> tuple[str, set[str]]:
    """Returns the newest schema of this MLflow, and every one from which it can get there."""
    from alembic.script import ScriptDirectory

    spec = find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations is not None
    scripts = ScriptDirectory(str(Path(spec.submodule_search_locations[0]) / "store" / "db_migrations"))
    newest = scripts.get_current_head()
    assert newest is not None
    return newest, {script.revision for script in scripts.walk_revisions()}


def _way_back(store: Path, known: set[str]) -> str:
    """Returns what to do about a newer MLflow's store: the copy of before, if there is one."""
    for copy in sorted(store.parent.glob(f"{store.name}{COPY}*")):
        if copy.name.rpartition(COPY)[2] in known:
            aside = store.with_name(f"{store.name}.newer")
            return (
                f"use the newer one, or go back: mv --backup=numbered {store} {aside}; mv {copy} {store}; "
                f"then `python -m train.tracking upload` sends the runs since"
            )
    return "use the newer one, or send to another store: `python -m train.tracking upload RUN --uri URI`"


def _copy(store: Path, copy: Path) -> None:
    """Copies a database that others may be using, whole or not at all; an earlier copy is kept.

    A migration that was interrupted may have left the store half changed, under the same schema.
    """
    if copy.exists():
        return
    partial = copy.with_name(f"{copy.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with (
            contextlib.closing(_open_to_read(store)) as source,
            contextlib.closing(sqlite3.connect(partial)) as target,
        ):
            source.backup(target)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(copy)
    except (sqlite3.Error, OSError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{store} cannot be copied to {copy} ({error}); it was not changed") from None


def _open_to_read(store: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(store.absolute()))}?mode=ro", uri=True)
