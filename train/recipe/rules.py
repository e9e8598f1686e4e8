"""The rules that a recipe must satisfy, checked before torch is imported or a process group made."""

import difflib
import fnmatch
import math
from collections.abc import Iterator

from train.recipe import sizes
from train.recipe.errors import UserError, Violation, raise_all
from train.recipe.keys import out_of_range
from train.recipe.layout_rules import check_layout
from train.recipe.names import unfit_as_file
from train.recipe.phase_rules import check_fill_in_middle, check_phases
from train.recipe.phases import domains_of
from train.recipe.preparation import CONVERSATIONS
from train.recipe.schema import (
    Compile,
    ExpertPrecision,
    Ffn,
    GroupScore,
    LossMean,
    Model,
    Moe,
    OptimizerStart,
    Phase,
    Position,
    Recipe,
    Recompute,
    Registry,
    ScheduleKind,
    TokenizerKind,
    Training,
)
from train.recipe.topology import Topology
from train.recipe.transfer import check_transfer

CL100K_TOKENS = 100_278
"""Token ids of cl100k_base, including DBRX's padding token (100277)."""

FORCED_BALANCE = "forced-balance"
"""Part of the name of a recipe with `model.moe.forced_balance`: of its folder, logs, pages and plans."""

INSTALLED_DOMAINS = ("code", "prose", "messages")
"""Domains of the installed corpus."""


def validate(recipe: Recipe, topology: Topology, file: str) -> None:
    """Raises for all violated rules; of numbers out of range, no other rule is looked at.

    Raises:
        UserError: one line for each, with file, key and remedy.
    """
    raise_all(_errors(out_of_range(recipe), file))
    errors: list[UserError] = []
    for check in (
        _model,
        check_transfer,
        _data,
        check_phases,
        check_fill_in_middle,
        _start,
        _training,
        _expert_precision,
        _recomputation,
        _optimizer,
        check_layout,
        _registry,
        _evaluation,
    ):
        try:
            errors += _errors(check(recipe, topology), file)
        except (ArithmeticError, LookupError, ValueError, AssertionError):
            # A rule may rest on one that is violated.
            if not errors:
                raise
    raise_all(errors)


def _errors(violations: Iterator[Violation], file: str) -> list[UserError]:
    return [UserError(each.what, key=each.key, remedy=each.remedy, file=file) for each in violations]


def _model(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    model = recipe.model
    if unfit := unfit_as_file(recipe.name):
        yield Violation(
            "name", f"{recipe.name!r} is not a folder name: it {unfit}", "use letters, digits, - and _"
        )
    if model.latent is not None:
        yield from _latent(model)
    elif model.head_width is None and model.d_model % model.n_heads:
        d_model, n_heads = model.d_model, model.n_heads
        yield Violation(
            "model.n_heads", f"{d_model=} is not divisible by {n_heads=}", "change either, or set head_width"
        )
    elif model.position is Position.rope and sizes.head_width(model) % 2:
        head_width, of = sizes.head_width(model), "n_heads" if model.head_width is None else "head_width"
        yield Violation(f"model.{of}", f"{head_width=} is odd, and RoPE rotates pairs", "make it even")
    elif model.position is Position.rope and (width := sizes.head_width(model) * model.rope_share) % 2:
        what = f"rotates {width:g} of head_width={sizes.head_width(model)} elements, and RoPE rotates pairs"
        yield Violation("model.rope_share", what, "rotate an even number")
    yield from _yarn(model)
    if model.n_heads % model.n_kv_heads:
        n_heads, n_kv_heads = model.n_heads, model.n_kv_heads
        yield Violation("model.n_kv_heads", f"{n_heads=} is not divisible by {n_kv_heads=}", "change either")
    if model.moe is not None and model.moe.forced_balance and FORCED_BALANCE not in recipe.name:
        yield Violation(
            "name",
            f"{recipe.name!r} hides that model.moe.forced_balance is set, and every figure bears the name",
            f"call it {recipe.name}-{FORCED_BALANCE}",
        )
    yield from _moe(model)
    # Those of any other tokenizer are compared once it is opened.
    ids = {
        TokenizerKind.cl100k_base: CL100K_TOKENS,
        TokenizerKind.bpe: recipe.tokenizer.vocab_size,
        TokenizerKind.hf: 0,
    }[recipe.tokenizer.kind]
    if model.vocab_size < ids:
        yield Violation(
            "model.vocab_size",
            f"{model.vocab_size} rows, but the tokenizer makes ids up to {ids - 1}",
            f"set it to at least {ids}",
        )


def _latent(model: Model) -> Iterator[Violation]:
    """Yields violations of latent attention, whose heads have widths and norms of their own."""
    latent = model.latent
    assert latent is not None
    if latent.rope_width % 2:
        rope_width = latent.rope_width
        yield Violation(
            "model.latent.rope_width", f"{rope_width=} is odd, and RoPE rotates pairs", "make it even"
        )
    if latent.v_width > sizes.head_width(model):
        v_width, head_width = latent.v_width, sizes.head_width(model)
        yield Violation(
            "model.latent.v_width",
            f"{v_width=} exceeds nope_width + rope_width = {head_width}",
            "values may not be wider than keys",
        )
    what = "is not for model.latent"
    if model.position is not Position.rope:
        yield Violation("model.position", f"{model.position.value} {what}", "use rope")
    if model.n_kv_heads != model.n_heads:
        n_heads, n_kv_heads = model.n_heads, model.n_kv_heads
        of = "every latent head has keys and values"
        yield Violation(
            "model.n_kv_heads", f"{n_kv_heads=} differs from {n_heads=}, but {of}", "make them equal"
        )
    others = {
        "head_width": model.head_width is not None,
        "rope_share": model.rope_share != 1,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "clip_qkv": model.clip_qkv is not None,
    }
    for name in (name for name, is_set in others.items() if is_set):
        yield Violation(f"model.{name}", what, f"remove it: {_LATENT_HAS[name]}")


_LATENT_HAS = {
    "head_width": "nope_width, rope_width and v_width are the widths of a head",
    "rope_share": "rope_width says what is rotated",
    "qkv_bias": "its products have no biases",
    "qk_norm": "the vectors of q_rank and kv_rank are normalised",
    "clip_qkv": "queries and keys are not clipped",
}


def _yarn(model: Model) -> Iterator[Violation]:
    yarn = model.yarn
    if yarn is None:
        return
    if model.position is not Position.rope:
        yield Violation("model.yarn", "stretches RoPE, but model.position is not rope", "remove it")
    if yarn.beta_slow >= yarn.beta_fast:
        beta_slow, beta_fast = yarn.beta_slow, yarn.beta_fast
        yield Violation(
            "model.yarn.beta_slow", f"{beta_slow=} is not below {beta_fast=}", "32 and 1 are usual"
        )
    if model.max_sequence_tokens <= yarn.original_tokens:
        yield Violation(
            "model.max_sequence_tokens",
            f"{model.max_sequence_tokens} does not exceed model.yarn.original_tokens={yarn.original_tokens}",
            "raise it, usually to original_tokens x factor, or remove model.yarn",
        )


def _moe(model: Model) -> Iterator[Violation]:
    moe = model.moe
    if moe is None:
        return
    if moe.top_k > moe.experts:
        top_k, experts = moe.top_k, moe.experts
        yield Violation("model.moe.top_k", f"{top_k=} exceeds {experts=}", f"set it to at most {experts}")
    if not sizes.expert_layers(model):
        dense_layers, n_layers = moe.dense_layers, model.n_layers
        yield Violation(
            "model.moe.dense_layers",
            f"{dense_layers=} and every_n_layers={moe.every_n_layers} leave none of {n_layers=} with experts",
            "lower either, or set model.moe=null",
        )
    yield from _groups(moe)
    if moe.shared_gate and moe.shared_hidden_size is None:
        yield Violation(
            "model.moe.shared_gate",
            "is the gate of a shared expert, but model.moe.shared_hidden_size is null",
            "set its hidden size, or remove the gate",
        )
    if model.ffn is Ffn.mlp:
        yield Violation(
            "model.ffn", "experts are GLUs; `mlp` is for dense models", "set model.ffn=glu or model.moe=null"
        )


def _groups(moe: Moe) -> Iterator[Violation]:
    """Yields violations of the groups that limit the choice of experts."""
    experts, groups, top_groups = moe.experts, moe.groups, moe.top_groups
    if experts % groups:
        yield Violation("model.moe.groups", f"{experts=} is not divisible by {groups=}", "use a divisor")
    elif top_groups > groups:
        yield Violation(
            "model.moe.top_groups", f"{top_groups=} exceeds {groups=}", f"set it to at most {groups}"
        )
    elif groups > 1 and moe.top_k > top_groups * experts // groups:
        yield Violation(
            "model.moe.top_groups",
            f"{top_groups} groups have {top_groups * experts // groups} experts, but top_k={moe.top_k}",
            "raise it, or lower top_k",
        )
    elif groups == experts > 1 and moe.group_score is GroupScore.top2_sum:
        yield Violation(
            "model.moe.group_score", "top2_sum needs two experts in a group", "use `max`, or fewer groups"
        )


def _data(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    data, domains = recipe.data, domains_of(recipe)
    mixture = "data.phases" if data.phases else "data.domains"
    if data.domains and data.phases:
        yield Violation("data.domains", "is set, but so is data.phases", "set only one of them")
    if not domains:
        yield Violation(
            mixture, "is empty", "name each domain and its share, for example {code: 0.5, prose: 0.5}"
        )
    for name in data.validation_domains:
        if name in domains:
            yield Violation(
                "data.validation_domains",
                f"{name} is already in {mixture}",
                "remove it: it is validated anyway",
            )
    for name in data.domain_max_epochs:
        if name not in domains:
            yield Violation(f"data.domain_max_epochs.{name}", "is not a domain", f"{mixture} has {domains}")
    named = {name: f"data.domains.{name}" if data.domains else mixture for name in domains}
    named |= {name: "data.validation_domains" for name in data.validation_domains}
    for name, key in named.items():
        if unfit := unfit_as_file(name):
            yield Violation(
                key, f"the domain {name!r} {unfit}", "a domain is a folder: use letters and digits"
            )
        if data.corpus == "installed" and name not in INSTALLED_DOMAINS:
            yield Violation(key, f"{name} is not in the installed corpus", f"it has {INSTALLED_DOMAINS}")
    masked = [source.domain for source in data.sources if source.kind in CONVERSATIONS]
    if any(name in domains for name in masked) and recipe.training.loss_mean is LossMean.positions:
        what = "is positions, but data.sources has conversations, of which only some tokens have a loss"
        yield Violation("training.loss_mean", what, "set it to targets")
    for index, skip in enumerate(data.skips):
        if not 0 <= skip.first_position < skip.end_position:
            what = f"positions {skip.first_position} to {skip.end_position} are an empty range"
            yield Violation(f"data.skips[{index}]", what, "positions count from 0; end_position is exclusive")
    total = math.fsum(data.domains.values())
    if data.domains and abs(total - 1) > 1e-6:
        yield Violation("data.domains", f"shares add up to {total:g}", "must add up to 1")
    if data.remote is None and data.cache_bytes is not None:
        yield Violation("data.cache_bytes", "limits the cache of data.remote, which is null", "remove it")
    if data.remote is not None and data.corpus is not None:
        yield Violation("data.corpus", "builds shards, but data.remote says where they are", "remove either")
    if data.corpus not in (None, "installed"):
        yield Violation("data.corpus", f"{data.corpus!r} is unknown", "`installed` or null")
    if data.sequence_tokens > recipe.model.max_sequence_tokens:
        yield Violation(
            "data.sequence_tokens",
            f"{data.sequence_tokens} exceeds model.max_sequence_tokens={recipe.model.max_sequence_tokens}",
            "lower it or raise the model's",
        )


def _start(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    if recipe.start.run is not None and recipe.start.weights is not None:
        yield Violation("start.run", "is set, but so is start.weights", "set only one of them")
    if recipe.start.batch is not None and recipe.start.run is None:
        yield Violation(
            "start.batch", "is set, but start.run is null", "set start.run to the run that is to be forked"
        )
    if recipe.start.optimizer is OptimizerStart.restored and recipe.start.run is not None:
        yield Violation(
            "start.optimizer", "is restored, but start.run restores all of a run", "remove start.optimizer"
        )
    elif recipe.start.optimizer is OptimizerStart.restored and recipe.start.weights is None:
        yield Violation(
            "start.optimizer",
            "is restored, but start.weights is null",
            "set start.weights to the run whose optimizer state is to be restored",
        )
    if not recipe.training.frozen:
        return
    names = [weight.name for weight in sizes.weights(recipe.model)]
    trained = set(names)
    for pattern in recipe.training.frozen:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            yield Violation(
                "training.frozen", f"{pattern!r} matches no weight", f"{near[0]} is one; * is any text"
            )
        trained -= set(matching)
    if not trained:
        yield Violation("training.frozen", "freezes every weight", "leave at least one to train")


def _registry(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    name = recipe.tracking.registered_model
    if recipe.tracking.registry is Registry.unity_catalog and (name is None or name.count(".") != 2):
        yield Violation(
            "tracking.registered_model",
            f"is {'null' if name is None else name}",
            "Unity Catalog needs catalog.schema.model",
        )


def _is_range(batches: list[int]) -> bool:
    return len(batches) == 2 and batches[0] <= batches[1]


def _training(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    training, schedule = recipe.training, recipe.schedule
    batch_tokens = training.global_batch_sequences * recipe.data.sequence_tokens
    if training.profile_batches and not _is_range(training.profile_batches):
        yield Violation(
            "training.profile_batches",
            f"is {training.profile_batches}",
            "give the first and the last batch, [20, 22]",
        )
    if training.duration_tokens < batch_tokens:
        yield Violation(
            "training.duration_tokens",
            f"{training.duration_tokens} is less than one batch of {batch_tokens} tokens",
            "raise it or lower training.global_batch_sequences",
        )
    if recipe.guard.recheck_interval_batches is not None and not training.deterministic:
        yield Violation(
            "guard.recheck_interval_batches",
            "compares steps bit for bit, but training.deterministic is false",
            "set training.deterministic=true, or remove it",
        )
    if schedule.warmup_tokens > training.duration_tokens:
        yield Violation(
            "schedule.warmup_tokens",
            f"{schedule.warmup_tokens} exceeds training.duration_tokens={training.duration_tokens}",
            "lower it",
        )
    if schedule.kind is ScheduleKind.wsd:
        if not schedule.decay_tokens:
            yield Violation("schedule.decay_tokens", "is 0", "wsd needs a decay; a tenth of the run is usual")
        if schedule.warmup_tokens + schedule.decay_tokens > training.duration_tokens:
            yield Violation(
                "schedule.decay_tokens",
                f"warm-up {schedule.warmup_tokens} and decay {schedule.decay_tokens} exceed "
                f"training.duration_tokens={training.duration_tokens}",
                "lower either",
            )


def _expert_precision(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    precision, model, name = recipe.training.expert_precision, recipe.model, "training.expert_precision"
    if precision is ExpertPrecision.same:
        return
    if model.moe is None:
        yield Violation(name, f"is {precision.value}, but the model is dense", "remove it")
        return
    if recipe.training.compile is not Compile.off:
        what = f"is not built for compiled layers, but training.compile={recipe.training.compile.value}"
        yield Violation(name, what, "remove either")
    tile, hidden = sizes.TILE[precision], "model.moe.expert_hidden_size"
    if model.moe.expert_hidden_size is None:
        hidden = "model.ffn_hidden_size"
    for key, width in (("model.d_model", model.d_model), (hidden, sizes.expert_width(model))):
        if width % tile:
            what = f"{width} is not divisible by {tile}, the numbers that share a scale in {precision.value}"
            yield Violation(key, what, f"make it a multiple of {tile}, or remove {name}")


def _recomputation(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    yield from _recomputed(recipe, "training", recipe.training)
    for n, phase in enumerate(recipe.data.phases):
        yield from _recomputed(recipe, f"data.phases[{n}]", phase)
    if recipe.training.offload:
        yield from _offloaded(recipe)


def _offloaded(recipe: Recipe) -> Iterator[Violation]:
    each: list[Training | Phase] = [recipe.training, *recipe.data.phases]
    if not any(Recompute.layer in (keys.recompute, keys.recompute_rest) for keys in each):
        what = "is true, but no layer recomputes `layer`, and others have more to keep than their input"
        yield Violation("training.offload", what, "set training.recompute=layer, or remove it")
    if recipe.training.compile is not Compile.off:
        what = f"is true, but training.compile is {recipe.training.compile.value}"
        yield Violation("training.offload", what, "remove one of them: compiled layers keep their inputs")


def _recomputed(recipe: Recipe, section: str, keys: Training | Phase) -> Iterator[Violation]:
    layers, first, rest = recipe.model.n_layers, keys.recompute_layers, keys.recompute_rest
    if keys.recompute is None and (first is not None or rest is not Recompute.nothing):
        what = "is null, but recompute_layers or recompute_rest is set"
        yield Violation(f"{section}.recompute", what, "set it, or remove them")
    elif first is None and rest is not Recompute.nothing:
        what = f"is {rest.value}, but {section}.recompute is for all layers"
        yield Violation(f"{section}.recompute_rest", what, f"set {section}.recompute_layers, or remove it")
    if first is not None and first > layers:
        what = f"is {first}, but the model has {layers} layers"
        yield Violation(f"{section}.recompute_layers", what, "give at most as many, or null for all")
    compiled = recipe.training.compile
    for name, grade in (("recompute", keys.recompute), ("recompute_rest", rest)):
        if compiled is not Compile.off and grade not in (None, Recompute.nothing, Recompute.layer):
            what = f"is {grade.value}, but training.compile is {compiled.value}"
            remedy = "use nothing or layer: the compiler chooses what compiled layers keep"
            yield Violation(f"{section}.{name}", what, remedy)
        if recipe.parallelism.interleave and grade is Recompute.ffn:
            what = "is ffn, but parallelism.interleave is true"
            yield Violation(f"{section}.{name}", what, "use gates or layer: the halves' parts are mixed")


def _optimizer(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    betas = recipe.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield Violation("optimizer.betas", f"is {betas}", "two numbers in [0, 1), for example [0.9, 0.95]")
    if recipe.optimizer.qk_clip is None:
        return
    model, compiled = recipe.model, recipe.training.compile
    others = {
        "model.qk_norm, which bounds the logits itself": model.qk_norm,
        "model.clip_qkv, which bounds queries and keys": model.clip_qkv is not None,
        "model.position=alibi": model.position is Position.alibi,
        f"training.compile={compiled.value}": compiled is not Compile.off,
    }
    for what in (what for what, is_set in others.items() if is_set):
        yield Violation("optimizer.qk_clip", f"is not built for {what}", "remove either")


def _evaluation(recipe: Recipe, _: Topology) -> Iterator[Violation]:
    evaluation = recipe.evaluation
    if evaluation.suite is None:
        for key in ("suite_data", "suite_questions", "suite_interval_batches", "suite_tasks"):
            if getattr(evaluation, key):
                yield Violation(
                    f"evaluation.{key}", "is set without a suite", "set evaluation.suite, or remove it"
                )
        return
    if evaluation.suite_data is None:
        yield Violation("evaluation.suite_data", "is null", "name the folder of the suite's task files")
    every, interval = evaluation.suite_interval_batches, evaluation.interval_batches
    if every is not None and (interval is None or every % interval):
        yield Violation(
            "evaluation.suite_interval_batches",
            f"{every} is not a multiple of evaluation.interval_batches={interval}",
            "the suite runs after a validation",
        )
