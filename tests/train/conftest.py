"""Fixtures: tiny recipes, a migrated MLflow store to copy, its real server in a thread, a run's folder."""

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from train.recipe.reading import load_recipe, to_yaml
from train.recipe.schema import Recipe, Tokenizer, TokenizerKind

if TYPE_CHECKING:
    from train.model.decoder import Decoder


SMOKE = Path(__file__).resolve().parents[2] / "yamls/smoke.yaml"
TinyRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def tiny_recipe() -> TinyRecipe:
    """Makes recipes of 12 batches of 8 sequences of 64 tokens; overrides take precedence."""

    def make(runs: Path, shards: Path, name: str, *overrides: str) -> Recipe:
        return load_recipe(
            SMOKE,
            [
                f"runs_dir={runs}",
                f"name={name}",
                f"data.shards={shards}",
                "on_existing=resume",
                "data.corpus_bytes=400000",
                "data.sequence_tokens=64",
                "data.validation_sequences=8",
                "tokenizer.vocab_size=512",
                "model.vocab_size=512",
                "model.d_model=32",
                "model.n_layers=2",
                "model.ffn_hidden_size=24",
                "model.moe.jitter_eps=0.01",
                "training.global_batch_sequences=8",
                "training.microbatch_sequences=4",
                "training.duration_tokens=6144",
                "training.precision=fp32",
                "schedule.warmup_tokens=1024",
                "optimizer.learning_rate=0.01",
                "checkpoint.interval_batches=4",
                "evaluation.interval_batches=6",
                "tracking.mlflow=false",
                *overrides,
            ],
        )

    return make


class MlflowServer:
    """MLflow's own REST server, which can stop and restart on the same port."""

    def __init__(self, store: Path) -> None:
        self.store = store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "MlflowServer":
        from mlflow.server import app
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, app, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded store after its first migration, which takes seconds."""
    from train.tracking.store import connect

    store = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{store}", store.parent / "mlflow-artifacts")
    return store


@pytest.fixture(scope="session")
def mlflow_server(new_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with its own store, not yet listening: `with mlflow_server:` starts it."""
    before = dict(os.environ)
    store = tmp_path_factory.mktemp("served") / "mlflow.db"
    shutil.copy(new_store, store)
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{store}"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = (store.parent / "served").as_uri()
    os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "false"
    yield MlflowServer(store)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def mlflow_folder(tmp_path: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs with a store in it; no variable points elsewhere, and requests aren't repeated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shutil.copy(new_store, tmp_path / "mlflow.db")
    return tmp_path


MakeRun = Callable[[Recipe], tuple[Path, "Decoder"]]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a run's folder: recipe, tokenizer, and a checkpoint of a decoder with random weights."""

    def make(recipe: Recipe) -> tuple[Path, "Decoder"]:
        import torch

        from train.checkpoint.files import Progress
        from train.checkpoint.saver import CheckpointSaver
        from train.model.decoder import Decoder
        from train.model.init import initialize
        from train.recipe.topology import Topology

        folder = tmp_path / recipe.name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        decoder = Decoder(recipe.model, device="cpu")
        initialize(decoder, recipe.model, seed=3)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if parameter.ndim == 1 or "router" in name:  # Norms of 1 would hide a wrong order.
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
            for bias in decoder.buffers():
                bias.copy_(torch.randn(bias.shape) * 0.1)
        wrapped = torch.nn.ModuleDict({"decoder": decoder})  # LanguageModel's prefix.
        optimizer = torch.optim.AdamW(decoder.parameters())
        saver = CheckpointSaver(folder / "checkpoints", Topology(), keep_last=2)
        saver.start(wrapped, optimizer, Progress(7, 56, 448, 1.0))
        saver.wait()
        return folder, decoder

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with only a tokenizer, of 300 ids, trained on this file."""
    from data.text.bpe import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    cfg = Tokenizer(kind=TokenizerKind.bpe, vocab_size=300)
    train_bpe(cfg, iter([Path(__file__).read_text()])).to_hugging_face(folder)
    return folder
