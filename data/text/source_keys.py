"""Keys of sources that contradict each other, refused before anything is read."""

from data.text.language import languages
from data.text.scores import check_scores
from data.text.token_ids import check_source_tokenizer
from train.recipe.errors import UserError
from train.recipe.keys import out_of_range
from train.recipe.names import unfit_as_file
from train.recipe.phases import domains_of
from train.recipe.preparation import (
    CONVERSATIONS,
    FileOrder,
    Preparation,
    Source,
    SourceKind,
    TokenRows,
)
from train.recipe.schema import Recipe


def check_sources(recipe: Recipe) -> None:
    """Rejects sources that contradict the recipe.

    Raises:
        UserError: one line that names the key.
    """
    data = recipe.data
    if data.corpus is not None:
        raise UserError("conflicts with data.sources", key="data.corpus", remedy="remove either")
    there = {source.domain for source in data.sources}
    for domain in [*domains_of(recipe), *data.validation_domains]:
        if domain not in there:
            remedy = f"they have {', '.join(sorted(there))}"
            raise UserError(f"no source has domain {domain}", key="data.sources", remedy=remedy)
    for n, source in enumerate(data.sources):
        if source.languages and (unknown := sorted(set(source.languages) - languages())):
            raise UserError(
                f"{unknown[0]} is not a language that can be detected",
                key=f"data.sources[{n}].languages",
                remedy=f"choose from {', '.join(sorted(languages()))}",
            )
        _check_repositories(source, f"data.sources[{n}]")
        _check_tokens(source, f"data.sources[{n}]")
        _check_licences(source, f"data.sources[{n}]")
        check_scores(source, data.preparation, f"data.sources[{n}]")
        if unfit := unfit_as_file(source.domain):
            key = f"data.sources[{n}].domain"
            raise UserError(f"{source.domain!r} {unfit}", key=key, remedy="use letters and digits")


def _check_tokens(source: Source, key: str) -> None:
    """Rejects keys of token ids where there are none, and ids without a tokenizer.

    Raises:
        UserError: one line that names the key.
    """
    if source.tokenizer is None:
        if source.kind is SourceKind.megatron:
            remedy = "name the tokenizer that made the files"
            raise UserError("is null, but kind megatron has token ids", key=f"{key}.tokenizer", remedy=remedy)
        if source.token_rows is TokenRows.stream:
            what = "is stream, but the source has text, as its tokenizer is null"
            raise UserError(what, key=f"{key}.token_rows", remedy="name the tokenizer, or remove it")
        return
    if source.kind in (SourceKind.text, *CONVERSATIONS):
        what = f"is set, but kind {source.kind.value} has no token ids"
        raise UserError(what, key=f"{key}.tokenizer", remedy="remove it")
    check_source_tokenizer(source.tokenizer, f"{key}.tokenizer")


def _check_licences(source: Source, key: str) -> None:
    """Rejects licences to keep where none are read, and columns or files of licences that there can't be.

    Raises:
        UserError: one line that names the key.
    """
    is_text = source.kind is SourceKind.text
    if source.licences and source.licence_column is None and not source.licence_files:
        if is_text:
            what = "is false, but data.sources has licences to keep"
            raise UserError(what, key=f"{key}.licence_files", remedy="set it to true")
        what = "is null, but data.sources has licences to keep"
        remedy = "name the column of the records' licences"
        raise UserError(what, key=f"{key}.licence_column", remedy=remedy)
    if source.licence_column is not None and not _has_columns_of_text(source):
        what = "is set, but licences are read from JSONL, Parquet, Arrow and MDS with text only"
        remedy = "set licence_files instead" if is_text else "remove it"
        raise UserError(what, key=f"{key}.licence_column", remedy=remedy)
    if source.licence_files and not is_text:
        what = f"is true, but kind {source.kind.value} is no tree of text files"
        raise UserError(what, key=f"{key}.licence_files", remedy="name licence_column instead")


def _check_repositories(source: Source, key: str) -> None:
    """Rejects repositories that nothing names, and an order by paths that are not known.

    Raises:
        UserError: one line that names the key.
    """
    of = source.repositories
    if of is None:
        return
    key = f"{key}.repositories"
    if source.kind in CONVERSATIONS or not (source.kind is SourceKind.text or _has_columns_of_text(source)):
        what = f"is set, but kind {source.kind.value} "
        what += "has conversations" if source.kind in CONVERSATIONS else "has token ids"
        raise UserError(what, key=key, remedy="remove it")
    if source.kind is SourceKind.text:
        for name, value in (("column", of.column), ("path_column", of.path_column)):
            if value is not None:
                what = "is set, but a text source has no columns"
                raise UserError(what, key=f"{key}.{name}", remedy="remove it, and set folders")
        if of.folders is None:
            what = "is null, so no folder is a repository"
            remedy = "set it to 1 if each folder in the source's path is a repository"
            raise UserError(what, key=f"{key}.folders", remedy=remedy)
        return
    if of.folders is not None:
        what = f"is {of.folders}, but only text sources have a repository in a folder"
        raise UserError(what, key=f"{key}.folders", remedy="remove it, and name column")
    if of.column is None:
        what = "is null, so nothing names the repository of a record"
        raise UserError(what, key=f"{key}.column", remedy="name the column, for example repo_name")
    if of.path_column is None and (of.order is not FileOrder.source or "{path}" in of.heading):
        what = f"is null, but the order is {of.order.value}" if of.order is not FileOrder.source else ""
        what = what or "is null, but the heading has {path}"
        remedy = "name the column of the files' paths, or set order=source and no {path} in the heading"
        raise UserError(what, key=f"{key}.path_column", remedy=remedy)


def _has_columns_of_text(source: Source) -> bool:
    """Returns whether a source's records have columns, and a text."""
    without = (SourceKind.text, SourceKind.megatron)
    return source.kind not in without and source.tokenizer is None


def check_preparation(preparation: Preparation) -> None:
    """Rejects numbers out of range.

    Raises:
        UserError: one line that names the key.
    """
    for violation in out_of_range(preparation, "data.preparation."):
        raise UserError(violation.what, key=violation.key, remedy=violation.remedy)
