"""A watched run: its watchdog from set-up to the end, and a record of the error that ends it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from composer.core import Callback

from train.health.collectives import CollectiveRecorder, Recorder, collectives_of
from train.health.heartbeat import ENDED_FILE, Ended, record_failure, records_folder, write_record
from train.health.stragglers import HeartbeatCallback, Stragglers
from train.health.watchdog import Watchdog
from train.recipe.errors import RecordedError
from train.recipe.schema import Recipe
from train.recipe.topology import Topology


@dataclass
class Watched:
    """A watched run's recorder, watchdog and callbacks."""

    recipe: Recipe
    topology: Topology
    folder: Path
    """Folder of the records."""
    recorder: Recorder | None
    """Recorder of this process's collectives; None without a watchdog or a process group."""
    watchdog: Watchdog | None
    """None if the recipe says `watch.hang_seconds: null`."""
    batch: int = 0
    """Batches trained."""

    def move(self, where: str) -> None:
        """Notes which part of set-up starts."""
        if self.watchdog is not None:
            self.watchdog.move(where, self.batch)

    def callbacks(self) -> list[Callback]:
        """Returns the callbacks for the training loop.

        Stragglers are compared only if waiting times in collectives are known: on gloo, with a watchdog.
        """
        watch, found = self.recipe.watch, list[Callback]()
        if self.watchdog is not None:
            found.append(HeartbeatCallback(self.watchdog))
        interval, recorder = watch.straggler_interval_batches, self.recorder
        if interval and isinstance(recorder, CollectiveRecorder) and self.topology.world_size > 1:
            factor = watch.straggler_factor
            found.append(Stragglers(self.folder, interval, factor, self.topology, recorder))
        return found


@contextmanager
def watched(recipe: Recipe, run_folder: Path, topology: Topology) -> Iterator[Watched]:
    """Watches the code in this context, and records an error that ends it."""
    folder = records_folder(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    watches_for_hangs = recipe.watch.hang_seconds is not None
    with collectives_of(watches_for_hangs) as recorder:
        watchdog = None
        if watches_for_hangs:
            watchdog = Watchdog(recipe.watch, folder, run_folder, topology, recorder)
            watchdog.start()
        watch = Watched(recipe, topology, folder, recorder, watchdog)
        try:
            yield watch
        except RecordedError:
            raise
        except Exception as error:
            batch = watchdog.batch if watchdog is not None else watch.batch
            record_failure(folder, topology, batch, error)
            raise
        except SystemExit as end:
            if topology.is_main and isinstance(end.code, int):
                write_record(folder / ENDED_FILE, Ended(end.code))
            raise
        finally:
            if watchdog is not None:
                watchdog.stop()
