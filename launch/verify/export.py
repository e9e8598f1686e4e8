"""The export check: transformers computes the same from the tiny recipe's export as our decoder."""

from collections.abc import Iterator
from pathlib import Path

from launch.verify.forked_ranks import run_ranks
from launch.verify.harness import ONE, Row, TableCheck, Workspace
from train.hf.architectures import family_for
from train.hf.check import NEW_TOKENS, TOLERANCE, Parity, compare
from train.hf.export import write_folder
from train.hf.import_hf import import_folder
from train.hf.weights import open_weights
from train.recipe.errors import UserError
from train.recipe.schema import Recipe
from train.recipe.topology import Topology

TIMEOUT_SECONDS = 600.0


class ExportCheck(TableCheck):
    """Trains the tiny recipe on one rank, exports it, compares, imports the export and exports it again.

    Args:
        recipe: the full recipe.

    Raises:
        UserError: if no architecture of transformers can express its model.
    """

    name = page = "export"
    title = "Export of"
    text = (
        "A trained tiny recipe exported to Hugging Face's format: transformers computes the same logits from "
        "it, and importing it and exporting it again gives the same bytes."
    )

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        try:
            family_for(recipe.model)
        except UserError as error:
            raise UserError(
                error.what, key="--export", remedy="leave it out and name the other checks"
            ) from None
        self.total = 3

    def run(self, workspace: Workspace) -> Iterator[Row]:
        """Yields a row for the logits, one for generated tokens, and one for the files."""
        source, folder = workspace.uninterrupted(ONE), workspace.folder

        def work(_: Topology) -> tuple[Parity, list[str]]:
            exported, imported, again = (folder / name for name in ("exported", "imported", "exported-again"))
            write_folder(open_weights(source), exported, shard_bytes=100_000)
            import_folder(exported, imported)
            write_folder(open_weights(imported), again)
            return compare(source, exported), different_files(exported, again)

        # Forked: a process that forks ranks must not run transformers' threads.
        [(parity, changed)] = run_ranks(1, work, TIMEOUT_SECONDS, folder / "export.log")
        wrong = (
            f"the largest difference of a logit is {parity.excess:.1f} times the tolerance ({TOLERANCE:g})"
        )
        figures = (
            f"{parity.architecture}: differ by {parity.largest_difference:.1e} of {parity.largest_logit:.1f}"
        )
        yield Row("logits", str(ONE), figures, [] if parity.excess <= 1 else [wrong])
        figures = f"{parity.same_tokens} of {NEW_TOKENS} greedily generated tokens are the same"
        same = parity.same_tokens == NEW_TOKENS
        yield Row("tokens", str(ONE), figures, [] if same else ["the generated texts diverge"])
        figures = "imported and exported again" + ("" if changed else ": the same bytes")
        yield Row("files", str(ONE), figures, [f"{name} has other bytes" for name in changed])


def different_files(one: Path, other: Path) -> list[str]:
    """Names of weight files that differ between two folders, or are in only one."""
    names = {file.name for folder in (one, other) for file in folder.glob("*.safetensors")}
    return sorted(
        name
        for name in names
        if not all((folder / name).is_file() for folder in (one, other))
        or (one / name).read_bytes() != (other / name).read_bytes()
    )
