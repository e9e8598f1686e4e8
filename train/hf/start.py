"""Checks of the weights that a recipe starts from, before torch is imported: folder, model, tokenizer."""

from pathlib import Path

from data.hugging_face_tokenizer import open_file
from data.tokenizer import TokenizerHandle, name_of, open_tokenizer
from train.hf.folders import (
    OTHER_TOKENIZERS,
    READ_TOKENIZERS,
    TOKENIZER_FILE,
    model_at,
    recipe_file_of,
    tokenizer_folder_of,
)
from train.recipe.catalogue import schema_keys
from train.recipe.errors import UserError
from train.recipe.keys import OnStart, walk
from train.recipe.reading import load_recipe
from train.recipe.schema import Model, OnExisting, OptimizerStart, Recipe, Tokenizer, TokenizerKind
from train.record.changes import differences, keys_at, keys_of
from train.record.run_folder import (
    CHECKPOINTS_FOLDER,
    RECIPE_FILE,
    SUMMARY_FILE,
    TOKENIZER,
    batches_of,
    read_digests,
)


def check_start(recipe: Recipe, file: str) -> list[str]:
    """Raises if the recipe cannot start from the weights it names; returns lines that describe the changes.

    Args:
        recipe: a valid recipe.
        file: the recipe's file, for the error.

    Raises:
        UserError: one line that names file, key and remedy.
    """
    if recipe.start.run is not None:
        return _check_fork(recipe, Path(recipe.start.run), file)
    if recipe.start.weights is None:
        return []
    path = Path(recipe.start.weights)
    try:
        model, parent = model_at(path)
    except UserError as error:
        raise UserError(
            str(error), key="start.weights", remedy="name a folder of weights", file=file
        ) from None
    _same_shapes(recipe.model, model, file)
    changes = [f"initial weights from {path}"]
    changes += [
        f"{name}: {_value(model, name)} before, {_value(recipe.model, name)} now"
        for name in _keys(OnStart.reported)
        if _value(model, name) != _value(recipe.model, name)
    ]
    if parent is None:
        if recipe.start.optimizer is OptimizerStart.restored:
            raise UserError(
                f"is restored, but {path} contains only weights",
                key="start.optimizer",
                remedy="set it to fresh",
                file=file,
            )
        return [*changes, *_told_of_tokenizer(recipe, file)]
    _same_tokenizer(recipe, parent, file)
    if recipe.start.optimizer is OptimizerStart.restored and parent.optimizer.kind != recipe.optimizer.kind:
        raise UserError(
            f"is restored, but {path} was trained with {parent.optimizer.kind.value}",
            key="start.optimizer",
            remedy=f"set it to fresh, or optimizer.kind={parent.optimizer.kind.value}",
            file=file,
        )
    if recipe.start.optimizer is OptimizerStart.restored and parent.optimizer.average_decay is None:
        _without_average(recipe, path, file)
    return [*changes, _rates(recipe, parent)]


def _without_average(recipe: Recipe, path: Path, file: str) -> None:
    """Raises if a recipe restores an average of the weights that the run did not keep."""
    if recipe.optimizer.average_decay is not None:
        raise UserError(
            f"is restored, but {path} kept no average of its weights",
            key="start.optimizer",
            remedy="set it to fresh, or optimizer.average_decay=null",
            file=file,
        )


def require_start_tokenizer(recipe: Recipe, tokenizer: TokenizerHandle, file: str = "") -> None:
    """Raises if the weights that the recipe starts from were trained with another tokenizer than the run's.

    A tokenizer that is trained with the shards exists only once they do.

    Args:
        recipe: the run's recipe.
        tokenizer: the run's tokenizer.
        file: the recipe's file, for the error.

    Raises:
        UserError: one line that names both tokenizers and the first id that they give another meaning.
    """
    if recipe.start.weights is None:
        return
    _require_recorded(recipe, tokenizer, file)
    folder = tokenizer_folder_of(Path(recipe.start.weights))
    theirs, why = _tokenizer_in(folder), ""
    if theirs is not None and theirs.name in READ_TOKENIZERS:
        try:
            why = tokenizer.mismatch(open_file(theirs)[0])
        except ValueError as error:
            why = str(error)
    elif theirs is not None:
        why = "is of another kind"
    if why:
        raise UserError(
            f"{tokenizer.name} is not the tokenizer that the weights were trained with: {theirs} {why}",
            key="tokenizer",
            remedy="use the same tokenizer, and shards written with it",
            file=file,
        )


def _require_recorded(recipe: Recipe, tokenizer: TokenizerHandle, file: str) -> None:
    """Raises if the run that trained the weights recorded another tokenizer, which its shards lack by now."""
    path = Path(recipe.start.weights or "")
    recipe_file = recipe_file_of(path)
    recorded = None if recipe_file is None else read_digests(recipe_file.parent).get(TOKENIZER)
    if recorded in (None, tokenizer.fingerprint):
        return
    before = tokenizer_folder_of(path)
    if _tokenizer_in(before) is not None:
        parent = model_at(path)[1]
        assert parent is not None
        # Its own tokenizer is still there, for a comparison of what the ids mean.
        if open_tokenizer(parent.tokenizer, before).fingerprint == recorded:
            return
    raise UserError(
        f"{tokenizer.name} (fingerprint {tokenizer.fingerprint[:12]}) is not the tokenizer that {path} was "
        f"trained with ({recorded[:12]}), and {before} no longer has that one",
        key="tokenizer",
        remedy="use the same tokenizer, and shards written with it",
        file=file,
    )


def _tokenizer_in(folder: Path) -> Path | None:
    """Returns the file of a folder's tokenizer; None if it has none."""
    files = (folder / name for name in (*READ_TOKENIZERS, *OTHER_TOKENIZERS))
    return next((file for file in files if file.is_file()), None)


def _check_fork(recipe: Recipe, source: Path, file: str) -> list[str]:
    """Checks a run that is to be forked; of a fork that has begun, the old run may be gone."""
    folder = Path(recipe.runs_dir) / recipe.name
    is_complete = (folder / SUMMARY_FILE).exists()
    begins_again = {
        OnExisting.resume: False,
        OnExisting.new: is_complete,
        OnExisting.overwrite: True,
    }
    if batches_of(folder / CHECKPOINTS_FOLDER) and not begins_again[recipe.on_existing]:
        return []
    saved = list(batches_of(source / CHECKPOINTS_FOLDER))
    what, remedy, key = "", "name another checkpoint of it", "start.batch"
    if not (source / RECIPE_FILE).is_file() or not saved:
        what, remedy, key = f"{source} is no run with a checkpoint", "name a run's folder", "start.run"
    elif source.resolve() == folder.resolve():
        what, remedy, key = f"is {source}, the run itself", "give the fork another name", "start.run"
    elif recipe.start.batch is not None and recipe.start.batch not in saved:
        there = ", ".join(map(str, sorted(saved)))
        what = f"is {recipe.start.batch}, but {source} has checkpoints of batches {there}"
    if what:
        raise UserError(what, key=key, remedy=remedy, file=file)
    parent = load_recipe(source / RECIPE_FILE)
    _same_shapes(recipe.model, parent.model, file)
    _same_tokenizer(recipe, parent, file)
    batch = recipe.start.batch or saved[0]
    before, now = keys_at(source, batch), keys_of(recipe)
    for name in (key.name for key in schema_keys().values() if key.rules.same_on_fork):
        if before.get(name) != now.get(name):
            raise UserError(
                f"is {now.get(name)}, but {source} was trained with {before.get(name)}, and a fork continues "
                "its data and optimizer",
                key=name,
                remedy="leave it as it was; start.weights begins another run with only the weights",
                file=file,
            )
    changes = [f"{each.key}: {each.before} before, {each.now} now" for each in differences(before, now)]
    return [f"{recipe.name} is a fork of {source} at batch {batch}", *changes]


def _rates(recipe: Recipe, parent: Recipe) -> str:
    """Compares the new peak learning rate with the old peak and the old final rate."""
    peak, old_peak = recipe.optimizer.learning_rate, parent.optimizer.learning_rate
    old_end = old_peak * parent.schedule.final_share
    against_end = f"{peak / old_end:.3g} x the old end" if old_end else "the old end was 0"
    warmup = f"{recipe.schedule.warmup_tokens:,} tokens of warm-up"
    return f"learning rate: peak {peak:g} is {peak / old_peak:.3g} x the old peak, {against_end}; {warmup}"


def _keys(on_start: OnStart) -> list[str]:
    """Returns the model's keys with this ``on_start``."""
    return [key.name for key in walk(Model, "model.") if (key.rules.on_start or OnStart.equal) is on_start]


def _value(model: Model, name: str) -> object:
    """Returns the value of a model key; None also if its section is null."""
    value: object = model
    for part in name.split(".")[1:]:
        value = getattr(value, part, None)
    return value


def _same_shapes(now: Model, before: Model, file: str) -> None:
    if (now.moe is None) != (before.moe is None):
        raise UserError(
            "the weights are of a dense model" if now.moe else "the weights are of a mixture of experts",
            key="model.moe",
            remedy="python -m train.hf upcycle makes experts from a dense model"
            if now.moe
            else "set model.moe",
            file=file,
        )
    for name in _keys(OnStart.equal):
        _same(name, _value(now, name), _value(before, name), file)


def _same(key: str, now: object, before: object, file: str) -> None:
    if now != before:
        raise UserError(
            f"is {now}, but the weights that the run starts from have {before}",
            key=key,
            remedy=f"set {key}={before}, or start from other weights",
            file=file,
        )


def _same_tokenizer(recipe: Recipe, parent: Recipe, file: str) -> None:
    """Raises if token ids mean other text; a trained tokenizer is stored with the shards."""
    here, there = recipe.tokenizer, parent.tokenizer
    equal = here.kind is there.kind
    if equal and here.kind is not TokenizerKind.cl100k_base:
        ours, theirs = (Path(r.data.shards) / TOKENIZER_FILE for r in (recipe, parent))
        equal = name_of(here) == name_of(there)
        if equal and ours.is_file() and theirs.is_file():
            mine, old = (open_tokenizer(r.tokenizer, Path(r.data.shards)) for r in (recipe, parent))
            equal = mine.fingerprint == old.fingerprint
        if equal and ours.is_file():
            _require_recorded(recipe, open_tokenizer(here, Path(recipe.data.shards)), file)
    if not equal:
        raise UserError(
            f"{_words(here)} is not the {_words(there)} that the weights were trained with",
            key="tokenizer",
            remedy="use the same tokenizer, and shards written with it",
            file=file,
        )


def _told_of_tokenizer(recipe: Recipe, file: str) -> list[str]:
    """Compares the tokenizer of a folder of weights with the recipe's, or says that it can't be done."""
    folder = tokenizer_folder_of(Path(recipe.start.weights or ""))
    if _tokenizer_in(folder) is None:
        return [
            f"the weights have no tokenizer with them, so it is not compared with {_words(recipe.tokenizer)}"
        ]
    cfg, shards = recipe.tokenizer, Path(recipe.data.shards)
    # One that is trained or fetched with the shards is compared once they are there.
    is_there = cfg.path is not None or (shards / TOKENIZER_FILE).is_file()
    if cfg.kind is TokenizerKind.cl100k_base or is_there:
        require_start_tokenizer(recipe, open_tokenizer(cfg, shards), file)
    return []


def _words(tokenizer: Tokenizer) -> str:
    if tokenizer.kind is TokenizerKind.bpe:
        return f"trained tokenizer of {tokenizer.vocab_size} ids"
    if tokenizer.kind is TokenizerKind.hf:
        return f"tokenizer {tokenizer.path or 'of the shards'}"
    return tokenizer.kind.value
