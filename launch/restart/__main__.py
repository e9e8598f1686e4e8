"""Keeps a job running: `python -m launch.restart -- composer -n 8 train/main.py yamls/dbrx-moe-a.yaml`."""

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from launch.restart.history import LOG_FILE, STOPPED_STATUS, Policy, read_log
from launch.restart.look_back import look_back
from launch.restart.supervisor import Supervisor
from launch.restart.together import HostPart, HostsGoneError
from launch.restart.warmth import Warmth
from train.health.heartbeat import RECORDS_VARIABLE, Failure, Heartbeat, read_records
from train.recipe.errors import UserError
from train.recipe.exit_status import PREEMPTED_STATUS, USAGE_STATUS
from train.recipe.reading import load_recipe
from train.record import log
from train.record.command import Figures, command
from train.record.lease import hold, release
from train.record.process import host_name, pid_space
from train.record.run_folder import require_resumption
from train.record.tables import text_table

EPILOG = """
After any failure (an exception, a kill, a lost node, a hang) the job is started again and resumes from the
newest valid checkpoint. Exit status: 0 finished, 2 a mistake in the recipe, 70 another try would not help,
75 told to end, everything saved. {hosts} and {nodes} in COMMAND become the hosts of a try:

  python -m launch.restart --hosts n1,n2,n3 --nodes 2 -- srun --nodelist={hosts} --nodes={nodes} job.sh

With --warm on several hosts each has its own, and {node} is its number in a try, {first} the first host:

  python -m launch.restart --warm --nodes 2 --place $I -- composer -n 8 --world_size 16 --node_rank {node} \\
      --master_addr {first} --master_port 29500 train/main.py RECIPE
"""

logger = log.get_logger("launch.restart")
RECORD_SECONDS = 2.0
"""Time for the other ranks to say why they fail, before they are killed."""
KILL_SECONDS = 30.0
"""Time for killed ranks to end."""
LOOK_SECONDS = 0.02
OVER_SECONDS = 0.2
"""Between two looks for the end of a try on other hosts."""

LIMITS: tuple[tuple[str, float, str, str], ...] = (
    ("--restarts", Policy.restarts, "N", "failures in a row without progress that stop the job"),
    ("--same-batch", Policy.same_batch, "N", "failures in a row at the same batch that stop the job"),
    (
        "--backoff",
        Policy.backoff_seconds,
        "SECONDS",
        "wait before a restart if a try has gained no batch, doubled for each further one",
    ),
    ("--longest-backoff", Policy.longest_backoff_seconds, "SECONDS", "upper bound of that wait"),
    ("--grace", 300.0, "SECONDS", "time to save after SIGTERM"),
    ("--gather", 600.0, "SECONDS", "with --place: time to wait for hosts"),
)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="the training command, after --")
    for option, default, unit, meaning in LIMITS:
        kind = type(default)
        parser.add_argument(
            option, type=kind, default=default, metavar=unit, help=f"{meaning} (default {default:g})"
        )
    parser.add_argument(
        "--records",
        metavar="DIR",
        help="folder of the ranks' records and of the log, on a shared file system "
        "(default: RUNS_DIR/NAME.restarts of the recipe in COMMAND)",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="keep a process that has imported everything, which forks the ranks of this host (Linux)",
    )
    parser.add_argument("--hosts", metavar="A,B,...", help="hosts to choose from, including spare ones")
    parser.add_argument("--nodes", type=int, metavar="N", help="hosts per try (default: all)")
    parser.add_argument(
        "--place",
        type=int,
        metavar="I",
        help="with --warm: a supervisor on each host; this is number I of --nodes N, from 0; spare from N on",
    )
    parser.add_argument("--show", action="store_true", help="print the log of tries and exit")
    parser.add_argument(
        "--look-back",
        action="store_true",
        help="for systems that restart jobs by themselves: log how the previous try ended and wait; exits "
        "with 0, or with 70 if another try would not help",
    )


@command(
    "python -m launch.restart",
    "Starts a training command again after any failure, within limits.",
    add_arguments,
    json="with --show: write the log as JSON too",
    mistakes=(OSError,),
    epilog=EPILOG,
)
def main(options: Namespace) -> int | Figures:
    """Supervises the command; returns the exit status of the job."""
    if not options.command and not ((options.show or options.look_back) and options.records):
        raise UserError(
            "no COMMAND: write it after --, for example -- composer -n 8 train/main.py RECIPE.yaml"
        )
    folder = Path(options.records) if options.records else _folder_of(options.command)
    policy = Policy(options.restarts, options.same_batch, options.backoff, options.longest_backoff)
    if options.show:
        return show(folder)
    if options.look_back:
        return look_back(folder, policy, logger.warning)
    hosts = tuple(filter(None, (options.hosts or "").split(",")))
    nodes = options.nodes or len(hosts)
    if nodes > len(hosts) and hosts:
        what = f"{nodes} nodes of {len(hosts)} hosts"
        raise UserError(what, key="--nodes", remedy="give more with --hosts")
    if options.place is not None and (hosts or not options.warm or nodes < 1 or options.place < 0):
        raise UserError("goes with --warm and --nodes N, without --hosts", key="--place")
    warmth = Warmth(nodes if options.place is not None else 1) if options.warm else None
    host = host_name() if options.place is not None else None
    training = TrainingCommand(options.command, folder, options.grace, warmth, host)
    together = None
    if options.place is not None:
        together = HostPart(folder, options.place, nodes, options.gather, training.run, logger.warning)
    start = training.run if together is None else together.lead
    supervisor = Supervisor(start, policy, folder, hosts, nodes, logger.warning)

    def end(_number: int, _frame: FrameType | None) -> None:
        supervisor.is_told_to_end = True
        if together is not None:
            together.is_told_to_end = True
        training.end()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return supervise(supervisor, together)
    finally:
        training.close()
        if warmth is not None:
            warmth.end()
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(supervisor: Supervisor, together: HostPart | None) -> int:
    """Supervises a job, or this host's part of it; returns the exit status."""
    if together is not None and together.place > 0:
        with together.alive():
            return together.follow()
    # Another supervisor of the same job would end this one's ranks as leftovers of its own.
    remedy = "wait for its end or end it: `--show` prints its tries"
    hold(supervisor.folder, key="--records", remedy=remedy)
    try:
        if together is None:
            return supervisor.run()
        with together.alive():
            status = STOPPED_STATUS
            try:
                status = supervisor.run()
            except HostsGoneError as error:
                logger.error(f"restart: stopped: {error}")
            together.finish(status)
            return status
    finally:
        release(supervisor.folder)


class TrainingCommand:
    """The training command, run in its own session.

    It is started for each try, unless a server that has imported can fork the ranks again: then the launcher
    of the first try lives on.

    Args:
        words: the command.
        folder: of the records.
        grace_seconds: time to save after SIGTERM.
        warmth: keeps the server; None: there is none.
        host: whose ranks the command starts, if other hosts have launchers of their own.
    """

    def __init__(
        self,
        words: list[str],
        folder: Path,
        grace_seconds: float,
        warmth: Warmth | None = None,
        host: str | None = None,
    ) -> None:
        self.words, self.folder, self.grace_seconds, self.warmth = words, folder, grace_seconds, warmth
        self.host = host
        self._is_told_to_end = False
        self._process: subprocess.Popen[bytes] | None = None
        self._words: list[str] = []
        self._is_kept = False
        """The launcher lives, and all of its ranks have ended."""

    def run(self, hosts: tuple[str, ...], node: int = 0, is_over: Callable[[], bool] | None = None) -> int:
        """Runs the command on the given hosts; returns its exit status, negative for a signal.

        Args:
            hosts: of the try.
            node: this host's number among them.
            is_over: whether the try has failed on another host, so that this one's ranks are to end; None: if
                there are others, the command itself starts their ranks.
        """
        places = {"{hosts}": ",".join(hosts), "{nodes}": str(len(hosts)), "{node}": str(node)}
        places["{first}"] = hosts[0] if hosts else ""
        words = []
        for word in self.words:
            for name, value in places.items():
                word = word.replace(name, value)  # noqa: PLW2901
            words.append(word)
        if self._is_kept and words == self._words and self.warmth is not None and self.warmth.begin_again():
            return self._wait(is_over)
        self.close()
        self._words = words
        environment = os.environ | {RECORDS_VARIABLE: str(self.folder.resolve())}
        if self.warmth is not None:
            environment |= self.warmth.variables(environment)
        try:
            self._process = subprocess.Popen(words, env=environment, start_new_session=True)
        except OSError as error:
            logger.error(f"{words[0]}: {error.strerror}; give an executable command")
            return USAGE_STATUS
        return self._wait(is_over)

    def _wait(self, is_over: Callable[[], bool] | None) -> int:
        """Waits for the end of a try; returns its status."""
        assert self._process is not None
        self._is_kept = False
        if self.warmth is not None and (first := self._first_end(self.warmth, is_over)) is not None:
            self._is_kept = self._wait_for_ranks(self.warmth, self._process, first[0])
            if not self._is_kept and self._process.poll() is None:
                self._end_rest()  # Its ranks are not the server's.
            if self._is_kept:
                return first[1]
        status = self._process.wait()
        if self._is_told_to_end and self._have_all_ended() and status == -signal.SIGTERM:
            # A launcher killed by SIGTERM leaves ranks that save and end by themselves.
            status = PREEMPTED_STATUS
        self._end_rest()
        return status

    def _first_end(self, warmth: Warmth, is_over: Callable[[], bool] | None) -> tuple[int, int] | None:
        """Waits for the end of a rank, here or elsewhere; returns its process id, 0 elsewhere, and status.

        None if the launcher has ended.
        """
        assert self._process is not None
        if is_over is None:
            return warmth.wait(self._process)
        while True:
            first = warmth.wait(self._process, OVER_SECONDS)
            if first is not None or self._process.poll() is not None:
                return first
            if is_over() and not self._is_told_to_end:
                return 0, -signal.SIGKILL

    def _wait_for_ranks(self, warmth: Warmth, launcher: "subprocess.Popen[bytes]", first: int) -> bool:
        """Waits until all ranks have ended; they get some time to say why, and are killed then.

        Returns:
            False if the launcher has ended, or ranks do not: others than the server's.
        """
        ended, kill_at = {first}, time.monotonic() + RECORD_SECONDS
        is_killed = False
        while launcher.poll() is None and time.monotonic() < kill_at + KILL_SECONDS:
            beats = read_records(self.folder, "beat-*.json", Heartbeat)
            here = [beat for beat in beats if self.host in (None, beat.host)]
            living = [beat.rank for beat in here if beat.pid not in ended]
            if not living:
                return True
            said = {each.rank for each in read_records(self.folder, "failed-*.json", Failure)}
            if not is_killed and (said.issuperset(living) or time.monotonic() > kill_at):
                warmth.kill_ranks()
                is_killed = True
            if (found := warmth.wait(launcher, LOOK_SECONDS)) is not None:
                ended.add(found[0])
        return False

    def close(self) -> None:
        """Ends a launcher that was kept for another try."""
        if self._is_kept:
            self._is_kept = False
            self._end_rest()

    def _end_rest(self) -> None:
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        end_leftovers(self.folder, self.host)

    def end(self) -> None:
        """Asks the job to save and stop, by SIGTERM whichever signal the supervisor received."""
        self._is_told_to_end = True
        self.signal(signal.SIGTERM)

    def _have_all_ended(self) -> bool:
        """Waits for all processes of the command, at most for the grace period; False if some still live."""
        assert self._process is not None
        end = time.monotonic() + self.grace_seconds
        while time.monotonic() < end:
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.2)
        return False

    def signal(self, number: int) -> None:
        """Sends a signal to all processes of the command on this host."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def end_leftovers(folder: Path, host: str | None = None) -> None:
    """Kills ranks of this job that are still alive on this machine, for example stopped ones.

    Args:
        folder: of the records.
        host: only the ranks of this name; None: all.
    """
    mark, here = f"{RECORDS_VARIABLE}={folder.resolve()}".encode(), pid_space()
    for beat in read_records(folder, "beat-*.json", Heartbeat):
        if beat.pid_space != here or host not in (None, beat.host):
            continue
        # The process's environment proves that it is ours and not another with a reused pid.
        with suppress(OSError):
            if mark in Path(f"/proc/{beat.pid}/environ").read_bytes().split(b"\0"):
                os.kill(beat.pid, signal.SIGKILL)


def show(folder: Path) -> Figures:
    """Prints the log of tries."""
    tries = read_log(folder)
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line["begun"])),
            f"try {line['try']}",
            f"{line['seconds']:.0f} s",
            line["kind"],
            f"batch {line['batch']}",
            line["line"] + (f"; {line['excluded']} excluded" if line["excluded"] else ""),
        )
        for line in tries
    ]
    print(text_table((), rows, "<>><><") if rows else f"{folder / LOG_FILE}: no tries yet")
    return Figures(tries)


def _folder_of(command: list[str]) -> Path:
    """Returns the records' folder next to the run of the recipe that the command names."""
    recipes = [word for word in command if word.endswith((".yaml", ".yml"))]
    if not recipes:
        raise UserError("is missing, and COMMAND names no recipe", key="--records", remedy="give the folder")
    after = command[command.index(recipes[0]) + 1 :]
    recipe = load_recipe(recipes[0], [word for word in after if "=" in word and not word.startswith("-")])
    try:
        require_resumption(recipe)
    except UserError as error:
        raise error.at(recipes[0]) from None
    return Path(recipe.runs_dir) / f"{recipe.name}.restarts"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
