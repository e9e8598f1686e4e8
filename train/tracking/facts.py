"""Facts about a run that MLflow gets besides its metrics, in `tracking.json`, and the run's identity there.

A run is found on a server by its ``uid``. A folder that was copied from another run's has that run's, and
gets one of its own before anything is sent.
"""

import contextlib
import dataclasses
import json
import uuid
from pathlib import Path

from train.recipe.errors import UserError
from train.record.files import write_json
from train.record.place import is_elsewhere, note_place
from train.record.run_folder import MLFLOW_FILE
from train.record.summary import DatasetInput

FACTS_FILE = "tracking.json"
RUNNING = "RUNNING"


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """The facts about a run that MLflow gets besides its metrics."""

    uid: str
    """Identifies the run on the server, so that it is found even if the response to its creation was lost."""
    name: str
    uri: str
    """Tracking server without user and password; empty for the store next to the run's folder."""
    experiment: str
    params: dict[str, str]
    tags: dict[str, str]
    datasets: list[DatasetInput]
    artifacts: list[str]
    """Files of the run's folder to send at its end, if they exist."""
    started_ms: int
    status: str = RUNNING
    """RUNNING, FINISHED, FAILED or KILLED."""

    def write(self, run_dir: Path) -> None:
        """Writes `tracking.json`."""
        write_json(run_dir / FACTS_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> "RunFacts":
        """Reads `tracking.json`.

        Raises:
            UserError: if there is none.
        """
        try:
            tree = json.loads((run_dir / FACTS_FILE).read_bytes())
            datasets = [DatasetInput(**dataset) for dataset in tree.pop("datasets")]
            return cls(**tree, datasets=datasets)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{run_dir} has no readable {FACTS_FILE} ({type(error).__name__})") from None


def own_facts(run_dir: Path) -> RunFacts:
    """Reads `tracking.json`; a copy of another run's folder first gets an identity of its own.

    What is sent later then goes to another MLflow run, and never into the original's.

    Raises:
        UserError: if there is none.
    """
    facts = RunFacts.read(run_dir)
    if is_elsewhere(run_dir) and _has_original(run_dir, facts):
        facts = renew_identity(run_dir, facts)
    note_place(run_dir)
    return facts


def renew_identity(run_dir: Path, facts: RunFacts) -> RunFacts:
    """Makes another run of a copied one: nothing that is sent goes to the original's MLflow run any more."""
    facts = dataclasses.replace(
        facts, uid=uuid.uuid4().hex, tags=facts.tags | {"finegrain.copy_of": facts.uid}
    )
    facts.write(run_dir)
    (run_dir / MLFLOW_FILE).unlink(missing_ok=True)
    return facts


def _has_original(run_dir: Path, facts: RunFacts) -> bool:
    """Returns whether the store may have a run of the folder that this one was copied from.

    An embedded store holds the runs next to it, and is copied with them.
    """
    if facts.uri:
        return True
    here = run_dir.resolve()
    for other in here.parent.glob(f"*/{FACTS_FILE}"):
        with contextlib.suppress(UserError):
            if other.parent != here and RunFacts.read(other.parent).uid == facts.uid:
                return True
    return False
