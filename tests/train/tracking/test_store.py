"""Stores of other versions of MLflow: taken over with a word and a copy, or refused in one line."""

import contextlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.train.tracking.test_mlflow_upload import at_server, facts, on_disk, write_steps
from train.recipe.errors import UserError
from train.record import metrics
from train.tracking.__main__ import main
from train.tracking.mlflow_upload import Upload, UploadError
from train.tracking.names import chart_key
from train.tracking.store import connect, schema_of, take_over

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
OF_2_22 = "0584bdc529eb"
"""The schema of MLflow 2.22."""
UNKNOWN = "ffffffffffff"


def older_store(store: Path) -> str:
    """Writes a store of MLflow 2.22, or if this is 2.22 of one before, with a run; returns its schema."""
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    spec = find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = f"{spec.submodule_search_locations[0]}/store/db_migrations"
    config = Config(f"{folder}/alembic.ini")
    config.set_main_option("script_location", folder)
    config.set_main_option("sqlalchemy.url", f"sqlite:///{store}")
    scripts = ScriptDirectory.from_config(config)
    schema = OF_2_22 if scripts.get_current_head() != OF_2_22 else scripts.get_revision(OF_2_22).down_revision
    assert isinstance(schema, str)
    engine = create_engine(f"sqlite:///{store}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, schema)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(store)) as database, database:
        database.execute(
            "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'old', 'active')"
        )
        database.execute(
            "INSERT INTO runs (run_uuid, name, status, start_time, lifecycle_stage, experiment_id, user_id) "
            "VALUES ('abc', 'trained before', 'FINISHED', 1, 'active', 7, 'me')"
        )
    return schema


def dump(store: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(store)) as database:
        return list(database.iterdump())


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with no store next to it yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "toy"
    folder.mkdir()
    return folder


def test_an_older_store_is_taken_over_with_a_word_and_a_copy(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = run_dir.parent / "mlflow.db"
    schema = older_store(store)
    before = dump(store)
    facts(status="FINISHED").write(run_dir)
    write_steps(run_dir, 1, 5)
    upload = Upload(run_dir)
    assert upload.sync() == 15
    lines = [line for line in capsys.readouterr().err.splitlines() if "older MLflow" in line]
    copy = store.with_name(f"mlflow.db.schema-{schema}")
    assert len(lines) == 1 and str(copy) in lines[0] and schema_of(store) in lines[0]
    assert dump(copy) == before and schema_of(copy) == schema != schema_of(store)
    assert at_server(upload) == on_disk(run_dir)
    assert upload._client.get_run("abc").info.run_name == "trained before"
    # The next one finds nothing to do.
    Upload(run_dir).sync()
    assert "older MLflow" not in capsys.readouterr().err
    assert [file.name for file in sorted(store.parent.glob("mlflow.db*"))] == ["mlflow.db", copy.name]


def test_the_first_copy_is_kept(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    copy = store.with_name(f"mlflow.db.schema-{older_store(store)}")
    # As if a migration had been interrupted: half of it is done, under the same schema.
    shutil.copy(store, copy)
    with contextlib.closing(sqlite3.connect(store)) as database, database:
        database.execute("UPDATE runs SET name = 'changed'")
    before = dump(copy)
    take_over(store)
    assert dump(copy) == before


def test_a_store_that_cannot_be_copied_is_left_as_it_is(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    older_store(store)
    before = store.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be copied to .* it was not changed") as caught:
            take_over(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert store.read_bytes() == before and list(tmp_path.iterdir()) == [store]


def test_a_migration_that_fails_names_the_copy(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    schema = older_store(store)
    with contextlib.closing(sqlite3.connect(store)) as database, database:
        # In the way of a migration of MLflow 3, and of one of 2.22.
        database.execute("CREATE TABLE logged_models (x)")
        database.execute("CREATE TABLE _alembic_tmp_datasets (x)")
    with pytest.raises(UserError, match=f"cannot be changed .*schema-{schema} is as it was before") as caught:
        take_over(store)
    assert "\n" not in str(caught.value)


def newer(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (UNKNOWN,))


def test_a_newer_store_is_refused_in_one_line(
    mlflow_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, store = mlflow_folder / "toy", mlflow_folder / "mlflow.db"
    run_dir.mkdir()
    newer(store)
    before = dump(store)
    facts().write(run_dir)
    with pytest.raises(UploadError, match=r"was written by a newer MLflow than MLflow .*--uri URI") as caught:
        Upload(run_dir).sync()
    assert "\n" not in str(caught.value)
    assert main(["upload", str(run_dir)]) == 1
    assert main(["ui", "--runs-dir", str(mlflow_folder)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("newer MLflow") == shown.count("\n") == 2
    assert dump(store) == before


def test_a_newer_store_names_the_copy_and_going_back_loses_nothing(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = run_dir.parent / "mlflow.db"
    connect(f"sqlite:///{store}", run_dir.parent / "mlflow-artifacts")
    facts().write(run_dir)
    write_steps(run_dir, 1, 10)
    assert Upload(run_dir).sync() == 31
    copy = store.with_name(f"mlflow.db.schema-{schema_of(store)}")
    shutil.copy(store, copy)
    # A newer MLflow takes the store over, and then more is sent.
    write_steps(run_dir, 11, 20)
    assert Upload(run_dir).sync() == 31
    newer(store)
    assert main(["upload", str(run_dir)]) == 1
    line = capsys.readouterr().err
    subprocess.run(["bash", "-ec", line[line.index("mv ") : line.index("; then")]], check=True)
    # Another process: in this one MLflow keeps the file open that was moved.
    done = _upload_by(sys.executable, run_dir)
    assert done.returncode == 0 and "31 metric values sent" in done.stdout and not done.stderr, done
    assert sent_steps(run_dir) == list(range(1, 21))


def sent_steps(run_dir: Path) -> list[int]:
    """Returns the steps of the run's loss in the store, by reading its file."""
    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    with contextlib.closing(sqlite3.connect(run_dir.parent / "mlflow.db")) as database:
        rows = database.execute(
            "SELECT step FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step",
            (run_id, chart_key(metrics.LOSS)),
        )
        return [step for (step,) in rows]


def test_what_is_no_database_is_a_line(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    store.write_text("not a database" * 100)
    with pytest.raises(UserError, match="cannot be read as an SQLite store"):
        take_over(store)
    assert schema_of(tmp_path / "absent.db") == ""


def test_nothing_is_reported_to_mlflows_makers() -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


OTHER = ROOT / (".venv" if ".venv-minimum" in sys.prefix else ".venv-minimum") / "bin" / "python"


def _upload_by(python: str, run_dir: Path) -> "subprocess.CompletedProcess[str]":
    command = [python, "-m", "train.tracking", "upload", str(run_dir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not OTHER.exists(), reason="the other stack is not installed")
def test_the_other_stacks_mlflow_there_and_back(run_dir: Path) -> None:
    """Both write one store: the older one refuses it in the end, and the way back that it names works."""
    facts(status="FINISHED").write(run_dir)
    write_steps(run_dir, 1, 5)
    sent = _upload_by(str(OTHER), run_dir)
    assert sent.returncode == 0 and not sent.stderr, sent
    write_steps(run_dir, 6, 9)
    older = sys.executable
    if schema_of(run_dir.parent / "mlflow.db") == OF_2_22:
        taken = _upload_by(sys.executable, run_dir)
        assert taken.returncode == 0, taken
        assert taken.stderr.count("older MLflow") == taken.stderr.count("\n") == 1, taken
        older = str(OTHER)
    refused = _upload_by(older, run_dir)
    assert refused.returncode == 1, refused
    assert refused.stderr.count("newer MLflow") == refused.stderr.count("\n") == 1, refused
    if "mv " in refused.stderr:
        way = refused.stderr[refused.stderr.index("mv ") : refused.stderr.index("; then")]
        subprocess.run(["bash", "-ec", way], check=True)
        back = _upload_by(older, run_dir)
        assert back.returncode == 0 and not back.stderr, back
        assert sent_steps(run_dir) == list(range(1, 10))
