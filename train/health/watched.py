"""A run under watch: its watchdog from set-up to the end, and word of the error that ends it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from composer.core import Callback

from train.health.collectives import CollectiveRecorder, record_collectives
from train.health.heartbeat import ENDED_FILE, Ended, record_failure, records_folder, write_record
from train.health.stragglers import HeartbeatCallback, Stragglers
from train.health.watchdog import Watchdog
from train.recipe.schema import Recipe
from train.recipe.topology import Topology


@dataclass
class Watched:
    """What watches a run."""

    recipe: Recipe
    topology: Topology
    folder: Path
    """Of the records."""
    recorder: CollectiveRecorder
    watchdog: Watchdog | None
    """None where the recipe says `watch.hang_seconds: null`."""
    batch: int = 0
    """Batches trained."""

    def move(self, where: str) -> None:
        """Notes that set-up has come to another part."""
        if self.watchdog is not None:
            self.watchdog.move(where, self.batch)

    def callbacks(self) -> list[Callback]:
        """What takes part in every step."""
        watch, found = self.recipe.watch, list[Callback]()
        if self.watchdog is not None:
            found.append(HeartbeatCallback(self.watchdog))
        if watch.straggler_interval_batches is not None and self.topology.world_size > 1:
            found.append(
                Stragglers(
                    self.folder,
                    watch.straggler_interval_batches,
                    watch.straggler_factor,
                    self.topology,
                    self.recorder,
                )
            )
        return found


@contextmanager
def watched(recipe: Recipe, run_folder: Path, topology: Topology) -> Iterator[Watched]:
    """Watches what is done within; an error that ends it is left in the records."""
    folder = records_folder(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    recorder = record_collectives()
    watchdog = None
    if recipe.watch.hang_seconds is not None:
        watchdog = Watchdog(recipe.watch, folder, run_folder, topology, recorder)
        watchdog.start()
    watch = Watched(recipe, topology, folder, recorder, watchdog)
    try:
        yield watch
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
