"""Checks of three steps of the user's trainer: does everything that shall train get a gradient, and does it move?

When: as part of `checks.model`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from vlmdet.doctor.calls import NotAvailable, UserCodeError, place_of
from vlmdet.doctor.checks import Check, Outcome, check, found, looked, skipped
from vlmdet.doctor.checks.built import argument, gradient_areas, uses_adapter
from vlmdet.doctor.checks.targets import area_of, plain_name

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

NO_GRADIENT = ("does not require grad", "require grad", "requires_grad")


@check("M08", "M13", "M15", needs=("build_trainer",))
def three_steps(evidence: Evidence) -> Outcome:
    """Go three steps: which trainable weights get a gradient, which move, by area."""
    built = evidence.trainer()
    if not built.trainable:
        raise NotAvailable("parameters that train")
    steps = evidence.steps()
    where = place_of(evidence.subject.build_trainer)
    checkpointing = bool(
        argument(evidence, "gradient_checkpointing") or getattr(built.model, "is_gradient_checkpointing", False)
    )
    keywords = argument(evidence, "gradient_checkpointing_kwargs")
    if steps.error is not None:
        if any(word in steps.error.text for word in NO_GRADIENT):
            yield from _no_graph(steps.error, where, checkpointing, keywords, len(built.trainable))
            for identifier in ("M13", "M15"):
                yield skipped(identifier, "a step that does not raise")
            return
        if not steps.losses:
            raise steps.error
    if not any(map(math.isfinite, steps.losses)):
        raise NotAvailable("a loss that is a finite number")
    starts = {
        name: norm for name, norm in steps.gradients.items() if ".lora_A." not in name
    }  # A's is 0 as long as B is
    areas = gradient_areas(starts or steps.gradients)
    shown = "tensors with a gradient: " + ", ".join(
        f"{area} {some} of {every}" for area, (some, every) in areas.items()
    )
    shown += f"; losses {', '.join(f'{one:.4f}' for one in steps.losses)}"
    told = list(_without_gradient(evidence, areas, shown, where, checkpointing, keywords))
    yield from told
    if told:
        for identifier in {"M08", "M13"} - {one.id for one in told}:
            yield skipped(identifier, "gradients in every area that trains")
    else:
        if _reentrant(keywords) and checkpointing:
            yield found(
                "M08",
                where=where,
                severity=2,
                certainty=0.6,
                evidence=f"gradient_checkpointing_kwargs={keywords}; here {shown}",
                cause="blocks are recomputed by re-entering autograd; gradients reach them in this release of "
                "transformers, and not in those in which "
                "the inputs of frozen embeddings carry none",
            )
        else:
            yield looked("M08", shown)
        seeing = [area for area in areas if area in ("vision", "merger", "deepstack")]
        yield looked("M13", shown) if seeing else skipped("M13", "trainable parameters in the vision tower")
    yield from _unmoved(steps, where, shown)


def _reentrant(keywords: Any) -> bool:
    return isinstance(keywords, dict) and keywords.get("use_reentrant") is True


@check("M08", needs=("settings",))
def recomputation(evidence: Evidence) -> Outcome:
    """Read from the settings alone how activations are recomputed beside frozen embeddings."""
    options = evidence.options
    if evidence.subject.build_trainer is not None or not options.get("gradient_checkpointing"):
        raise NotAvailable("build_trainer, or gradient_checkpointing in the settings")
    keywords = options.get("gradient_checkpointing_kwargs")
    reentrant = _reentrant(keywords) or options.get("use_reentrant") is True
    old = re.match(r"4\.", evidence.versions().get("transformers", "")) is not None and keywords is None
    if (reentrant or old) and uses_adapter(evidence) and not options.get("enable_input_require_grads"):
        yield found(
            "M08",
            where="settings",
            certainty=0.7 if reentrant else 0.4,
            severity=3 if reentrant else 2,
            evidence=f"gradient_checkpointing=True, gradient_checkpointing_kwargs={keywords}, LoRA on frozen "
            "embeddings, enable_input_require_grads is not set",
            cause="blocks are recomputed by re-entering autograd, which passes no gradient where a block's "
            "input carries none, as that of frozen embeddings does",
        )
    else:
        yield looked("M08", f"gradient_checkpointing_kwargs={keywords}")


def _no_graph(error: UserCodeError, where: str, checkpointing: bool, keywords: Any, trainable: int) -> Outcome:
    setting = f"gradient_checkpointing={checkpointing}, gradient_checkpointing_kwargs={keywords}"
    yield found(
        "M08",
        where=where,
        evidence=f"{trainable} tensors are trainable, and backward raised {error.text}\n{setting}",
        cause="blocks are recomputed by re-entering autograd, which cuts the graph where a block's input "
        "carries no gradient, as that of "
        "frozen embeddings does"
        if checkpointing
        else "the loss does not depend on what trains: it is reckoned under no_grad, or detached",
    )


def _without_gradient(
    evidence: Evidence, areas: dict[str, tuple[int, int]], shown: str, where: str, checkpointing: bool, keywords: Any
) -> Outcome:
    """Tell of areas whose trainable weights get none: by recomputation (M08), or because the vision tower is outside the
    graph (M13)."""
    from vlmdet.doctor.live import probes

    dead = [
        area
        for area, (some, every) in areas.items()
        if every and some < 0.2 * every and area not in ("head", "embeddings")
    ]
    if not dead:
        return
    built = evidence.trainer()
    try:
        batch = probes.first_batch(evidence, built)
        if probes.supervised_tokens(batch) == 0:
            return  # nothing to learn in the batch: the labels are told elsewhere
        pictures = probes.shows_pictures(batch)
        freely = gradient_areas(
            {n: g for n, g in probes.gradients(evidence, built, recompute=False).items() if ".lora_A." not in n}
        )
    except UserCodeError:
        pictures, freely = True, {}
    setting = f"gradient_checkpointing={checkpointing}, gradient_checkpointing_kwargs={keywords}"
    if checkpointing and any(freely.get(area, (0, 0))[0] > areas[area][0] for area in dead):
        again = ", ".join(f"{area} {some} of {every}" for area, (some, every) in freely.items())
        yield found(
            "M08",
            where=where,
            evidence=f"{shown}\nthe same without recomputation: {again}\n{setting}",
            cause="blocks are recomputed by re-entering autograd, which passes no gradient where a block's "
            "input carries none, as that of "
            "frozen embeddings does",
        )
        return
    seeing = [area for area in dead if area in ("vision", "merger", "deepstack")]
    if len(seeing) < len(dead) or len(dead) == len(areas):
        yield found(
            "M08",
            where=where,
            evidence=f"{shown}\n{setting}",
            cause="the loss does not depend on these weights: their outputs are detached, replaced or not used",
        )
    elif pictures:
        yield found(
            "M13",
            where=where,
            evidence=shown,
            title=f"Trainable weights of the {' and '.join(seeing)} get no gradient",
            cause="the pictures pass the vision tower under no_grad, or its output is detached",
        )


def _unmoved(steps: Any, where: str, shown: str) -> Outcome:
    """Tell of weights that have a gradient and are where they were after three steps."""
    graded = {name for name, norm in steps.gradients.items() if norm}
    if not graded or len(steps.losses) < 3:
        yield skipped("M15", "three steps with gradients")
        return
    still = {name for name in graded if steps.moved.get(name, 0.0) == 0.0}
    absent = {name for name in graded if name not in steps.optimised}
    rates = ", ".join(f"{rate:.3g}" for rate in steps.rates)
    lines = (
        f"{len(still)} of {len(graded)} weights with a gradient did not move in three steps; learning "
        f"rates of the optimiser's groups: {rates or 'none'}"
    )
    by_area = {}
    for area in {area_of(plain_name(name)) for name in still}:
        of_area = {name for name in graded if area_of(plain_name(name)) == area}
        by_area[area] = (len(of_area & still), len(of_area))
    whole = [area for area, (some, every) in by_area.items() if some == every]
    if len(still) > 0.9 * len(graded) or (
        whole and {name for name in still if area_of(plain_name(name)) in whole} & absent
    ):
        held = sum(name in steps.optimised for name in graded)
        foreign = len(steps.optimised - set(steps.gradients))
        lines += f"\nof the weights that train, the optimiser holds {held} of {len(steps.gradients)}" + (
            f", and {foreign} others" if foreign else ""
        )
        zero = bool(steps.rates) and not any(steps.rates)
        if zero:
            cause = "the learning rate is 0"
        elif absent >= still:
            cause = (
                "the optimiser was made before the adapter, or from another list of weights, and does not "
                "hold what trains"
            )
        else:
            cause = (
                "the optimiser's steps change nothing: a rate too small for the weights' precision, or "
                "steps that are skipped"
            )
        yield found("M15", where=where, evidence=f"{lines}\n{shown}", cause=cause)
    elif whole and any(not rate for rate in steps.rates):
        yield found(
            "M15",
            where=where,
            evidence=f"{lines}; all of the {', '.join(whole)}",
            certainty=0.7,
            cause=f"the learning rate of the group that holds the {', '.join(whole)} is 0",
        )
    else:
        yield looked(
            "M15",
            f"{len(graded) - len(still)} of {len(graded)} weights with a gradient moved in three steps; rates {rates}",
        )


CHECKS: tuple[Check, ...] = (three_steps, recomputation)
