"""Checks of added tokens: do they have a row of the embeddings, and does it train and stay?

When: as part of `checks.model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable
from vlmdet.doctor.checks import Check, Outcome, check, found, looked
from vlmdet.doctor.checks.built import adapter_configs, model_of, trainer_of, uses_adapter
from vlmdet.doctor.checks.targets import area_of, plain_name

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence


@check("T05", needs=("build_trainer|model|settings",))
def new_tokens(evidence: Evidence) -> Outcome:
    """Compare the tokenizer with the rows of the embeddings, and see whether rows of new tokens train and are saved."""
    model, built, subject, options = model_of(evidence), trainer_of(evidence), evidence.subject, evidence.options
    holders = [getattr(built.trainer, "processing_class", None) if built is not None else None, subject.processor]
    processor = next((one for one in holders if one is not None), None)
    tokenizer = getattr(processor, "tokenizer", processor)
    asked = [
        str(one)
        for name in ("new_tokens", "added_tokens", "extra_tokens", "new_special_tokens")
        for one in _listed(options.get(name))
    ]
    if model is None or tokenizer is None or not hasattr(tokenizer, "__len__"):
        if not asked:
            raise NotAvailable("a model or trainer, with a processor")
        yield from _told_new(evidence, asked, "settings", 0.7)
        return
    embedding = _embedding(model)
    if embedding is None:
        raise NotAvailable("a model with input embeddings")
    rows = int(embedding.weight.shape[0])
    size = (
        max(len(tokenizer), *(1 + one for one in tokenizer.get_vocab().values()))
        if hasattr(tokenizer, "get_vocab")
        else len(tokenizer)
    )
    if size > rows:
        over = sorted(word for word, number in tokenizer.get_vocab().items() if number >= rows)[:6]
        yield found(
            "T05",
            where="model",
            evidence=f"the tokenizer has {size:,} tokens, the embeddings {rows:,} rows; "
            f"without a row: {', '.join(map(repr, over))}",
            cause="tokens were added and the embeddings were not resized (or resized on another object)",
        )
        return
    base = getattr(subject.processor, "tokenizer", subject.processor)
    known = set(base.get_vocab()) if built is not None and base is not None and hasattr(base, "get_vocab") else None
    added = sorted(set(tokenizer.get_vocab()) - known) if known is not None and base is not tokenizer else []
    new = added or [one for one in asked if one in tokenizer.get_vocab()]
    if new or asked:
        yield from _told_new(evidence, new or asked, "build_trainer" if added else "settings", 1.0 if added else 0.8)
        return
    yield looked("T05", f"{size:,} tokens, {rows:,} rows of embeddings, no tokens added")


def _told_new(evidence: Evidence, new: list[str], where: str, certainty: float) -> Outcome:
    """Tell of added tokens whose rows an adapter leaves random."""
    model, options = model_of(evidence), evidence.options
    if uses_adapter(evidence) is not True:
        yield looked("T05", f"{len(new)} added tokens; whole weights train")
        return
    configs = adapter_configs(model).values()
    saved = [str(one) for config in configs for one in _listed(getattr(config, "modules_to_save", None))]
    saved += [str(one) for one in _listed(options.get("modules_to_save"))]
    rows = any(getattr(config, "trainable_token_indices", None) for config in configs) or options.get(
        "trainable_token_indices"
    )
    trains = model is not None and any(
        one.requires_grad for name, one in model.named_parameters() if area_of(plain_name(name)) == "embeddings"
    )
    shown = f"added tokens: {', '.join(map(repr, new[:6]))}; modules_to_save={saved or None}"
    if rows or trains or any(area_of(one) == "embeddings" for one in saved):
        yield looked("T05", shown)
        return
    yield found(
        "T05",
        where=where,
        evidence=f"{shown}; the embeddings do not train",
        certainty=certainty,
        cause="the adapter trains other layers only: rows of new tokens stay random, and are not saved with it",
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [one for inner in value.values() for one in _listed(inner)]
    return [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple, set)) else []


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


CHECKS: tuple[Check, ...] = (new_tokens,)
