"""Validation sequences of shards: which domains need them, and whether there are enough."""

from data.shards.manifest import Manifest
from train.recipe.errors import UserError
from train.recipe.phases import domains_of
from train.recipe.schema import Recipe


def validated_domains(recipe: Recipe) -> list[str]:
    """Sorted names of the domains with a validation loss: those trained on, and those added to them."""
    return sorted({*domains_of(recipe), *recipe.data.validation_domains})


def require_validation(manifest: Manifest, recipe: Recipe) -> None:
    """Raises unless every validated domain has the recipe's number of validation sequences.

    Raises:
        UserError: one line that names the first domain that has fewer.
    """
    wanted = recipe.data.validation_sequences
    for domain in validated_domains(recipe):
        there = manifest.domains[domain].splits["validation"].samples
        if there < wanted:
            raise UserError(
                f"is {wanted}, but {recipe.data.shards} has {there} of {domain}",
                key="data.validation_sequences",
                remedy=f"set it to {there} at most, or build from more text",
            )
