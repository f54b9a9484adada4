"""Positions of image tokens, what is kept between calls, and rows packed together, on a small model (V08 to V10).

When: by `checks/vision.py`, after pictures were looked at. torch is used through the small model only.
"""

from __future__ import annotations

import contextlib
import copy
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdet.doctor.calls import NotAvailable, UserCodeError, call, parameters_of, place_of
from vlmdet.doctor.checks import Outcome, found, looked, skipped
from vlmdet.doctor.checks.picture_paths import collate_drawn, merge_of, one_picture, plain_picture, processor_grid
from vlmdet.doctor.evidence import once
from vlmdet.doctor.gather.batches import Batch, as_array

if TYPE_CHECKING:
    from vlmdet.doctor.evidence import Evidence

WIDE, TALL = (336, 112), (168, 252)
"""Sizes of drawn pictures: of other shape, and of another number of tokens on the longer side."""
FAULTY = ((4, 55, 0), (4, 56, 0))
"""Releases of transformers, first and last, whose Qwen-VL positions are wrong: transformers#40136, mended by PR#40490."""


@once
def wide_and_tall(evidence: Evidence) -> tuple[Batch, Batch]:
    """Collate one row with a wide and with a tall drawn picture.

    Raises:
        NotAvailable: that cannot be done.
    """
    chosen = one_picture(evidence.examples())[:1]
    if not chosen:
        raise NotAvailable("rows with one picture")
    wide, tall = (
        collate_drawn(evidence, chosen, [plain_picture(*size, (200, 90, 40))], "one row")[0] for size in (WIDE, TALL)
    )
    return wide, tall


# ---- V08 ------------------------------------------------------------------------------------------------------------


def positions_follow(evidence: Evidence) -> Outcome:
    """V08: positions of image tokens go by rows and columns, on a wide picture as on a tall one."""
    version = evidence.versions().get("transformers", "")
    numbers = tuple(int(one) for one in re.findall(r"\d+", version)[:3])
    if "qwen" in evidence.family() and len(numbers) >= 2 and FAULTY[0] <= (*numbers, 0)[:3] <= FAULTY[1]:
        yield found(
            "V08",
            where=f"transformers {version}",
            evidence=(
                f"transformers {version} with {evidence.family()}; releases {_version(FAULTY[0])} to "
                f"{_version(FAULTY[1])} are faulty"
            ),
            cause="these releases compute positions of image tokens wrongly",
            certainty=0.8,
        )
        return
    batches = wide_and_tall(evidence)
    place = place_of(evidence.subject.collate)
    for name, batch, size in zip(("wide", "tall"), batches, (WIDE, TALL), strict=True):
        if batch.grids is None or len(batch.grids) != 1:
            raise NotAvailable("image_grid_thw in the batch: a family whose positions have rows and columns")
        grid = batch.grids[0]
        alone = processor_grid(evidence.subject.processor, plain_picture(*size, (200, 90, 40)))
        if grid[1] != grid[2] and (grid[1] > grid[2]) != (size[1] > size[0]):
            yield found(
                "V08",
                where=f"{place}, image_grid_thw",
                evidence=(
                    f"a {name} picture of {size[0]} x {size[1]}: image_grid_thw {tuple(grid)} in your "
                    "batch (frames, rows, columns)"
                )
                + (f", {alone} by your processor alone" if alone else ""),
                cause="rows and columns are exchanged in the grid, so positions run along the wrong axis",
            )
            return
    wrong = [
        text
        for name, batch, size in zip(("wide", "tall"), batches, (WIDE, TALL), strict=True)
        if (text := _wrong_in_batch(evidence, batch, size))
    ]
    if wrong:
        yield found(
            "V08",
            where=f"{place}, position_ids" if "position_ids" in wrong[0] else f"{place}, mm_token_type_ids",
            evidence="\n".join(wrong),
            cause="the collator's own positions do not go by rows and columns of the picture",
        )
        return
    try:
        tiny = evidence.tiny()
    except NotAvailable as error:
        yield skipped("V08", str(error))
        return
    told = []
    for name, batch, size in zip(("wide", "tall"), batches, (WIDE, TALL), strict=True):
        try:
            positions = _rope_index(tiny.model, batch, evidence.image_token_id())
        except UserCodeError as error:
            raise NotAvailable(
                f"a get_rope_index that takes ids, grids and mask; it raised {error.text[:200]}"
            ) from None
        text = _compare(evidence, batch, positions)
        if text:
            yield found(
                "V08",
                where=f"{type(tiny.model).__name__}.get_rope_index",
                evidence=f"a {name} picture of {size[0]} x {size[1]}, grid {tuple(batch.grids[0])}: {text}",  # type: ignore[index]
                cause="the model's positions do not go by rows and columns of the picture",
            )
            return
        told.append(f"{name} {tuple(batch.grids[0])}")  # type: ignore[index]
    yield looked("V08", f"positions of image tokens go by rows and columns: {', '.join(told)}; transformers {version}")


def _version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _wrong_in_batch(evidence: Evidence, batch: Batch, size: tuple[int, int]) -> str:
    token = evidence.image_token_id()
    kinds = batch.raw["mm_token_type_ids"] if "mm_token_type_ids" in batch.raw.keys() else None  # noqa: SIM118  BatchFeature
    if kinds is not None and token is not None:
        marked, ids = as_array(kinds)[0], np.array(batch.ids[0])
        if len(marked) == len(ids) and (ids == token).any() and not marked[ids == token].all():
            return (
                f"mm_token_type_ids is 0 at {int((marked[ids == token] == 0).sum())} of "
                f"{int((ids == token).sum())} image tokens"
            )
    given = batch.raw["position_ids"] if "position_ids" in batch.raw.keys() else None  # noqa: SIM118
    if given is None or "qwen" not in evidence.family():
        return ""
    array = as_array(given)
    if array.ndim == 3 and array.shape[0] in (3, 4):
        text = _compare(evidence, batch, array[-3:])
        return f"position_ids for a picture of {size[0]} x {size[1]}: {text}" if text else ""
    return f"position_ids has shape {array.shape}: one axis, where this family has three (frames, rows, columns)"


def _rope_index(model: Any, batch: Batch, token: int | None) -> np.ndarray:
    """Return positions (3, batch, tokens) as the model computes them.

    Raises:
        NotAvailable: it has no such function.
    """
    import torch

    holder = next((one for one in (model, *model.modules()) if hasattr(one, "get_rope_index")), None)
    if holder is None:
        raise NotAvailable("a model with positions of three axes (get_rope_index)")
    ids = torch.tensor(batch.ids)
    given: dict[str, Any] = {"image_grid_thw": torch.tensor(batch.grids), "attention_mask": torch.tensor(batch.mask)}
    if any(
        one.name == "mm_token_type_ids" or one.kind == one.VAR_KEYWORD
        for one in parameters_of(holder.get_rope_index).values()
    ):
        given["mm_token_type_ids"] = (ids == token).int()
    return as_array(call("model", holder.get_rope_index, ids, **given)[0])


def _compare(evidence: Evidence, batch: Batch, positions: np.ndarray) -> str:
    """Return what is wrong with positions (3, batch, tokens) of the first row's image tokens; "" where nothing is."""
    token = evidence.image_token_id()
    places = [i for i, one in enumerate(batch.ids[0]) if one == token]
    assert batch.grids is not None
    merge = merge_of(evidence.subject.processor)
    rows, columns = batch.grids[0][1] // merge, batch.grids[0][2] // merge
    if len(places) != rows * columns or positions.shape[-1] != len(batch.ids[0]):
        return ""  # told as V05
    got = positions[:, 0, places]
    got = got - got[:, :1]
    wanted = np.stack(
        [np.zeros(rows * columns, int), np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)]
    )
    if np.array_equal(got, wanted):
        return ""
    ends = [
        f"{name} {int(line.min())} to {int(line.max())}"
        for name, line in zip(("frames", "rows", "columns"), got, strict=True)
    ]
    return f"{rows} rows and {columns} columns of image tokens have positions {', '.join(ends)}"


def sees_picture(evidence: Evidence, red: Batch, blue: Batch) -> tuple[str, str] | None:
    """Compare what a small model expects next after two batches that differ in their pixels only.

    Output: ("V06" or "V05", evidence) where it is the same or the batch is refused; None where it differs, or cannot be had.
    """
    import torch

    if red.ids != blue.ids:
        return None
    outputs = []
    try:
        model: Any = evidence.tiny().model
        for batch in (red, blue):
            given = _tensors(evidence, batch)
            if getattr(model.config, "is_encoder_decoder", False):
                return None
            with torch.no_grad():
                outputs.append(as_array(call("model", model, **given).logits)[0])
    except NotAvailable:
        return None
    except UserCodeError as error:
        low = error.text.lower()
        return ("V05", error.text) if "features" in low and "tokens" in low and "match" in low else None
    real = [i for i, one in enumerate(red.mask[0]) if one] or [len(red.ids[0]) - 1]
    difference = float(np.abs(outputs[0][real[-1]] - outputs[1][real[-1]]).max())
    if difference > 0:
        return None
    return "V06", "logits of the last token are exactly the same after a red and after a blue picture"


# ---- V09 ------------------------------------------------------------------------------------------------------------


def nothing_kept(evidence: Evidence) -> Outcome:
    """V09: what the model says to a picture does not depend on which picture it saw before."""
    import torch

    wide, tall = wide_and_tall(evidence)
    tiny = evidence.tiny()
    model: Any = copy.deepcopy(tiny.model).eval()
    keeps = any(hasattr(one, "rope_deltas") for one in model.modules())
    if not keeps and not tiny.own:
        raise NotAvailable("a model that keeps positions between calls (rope_deltas)")
    question = [_tensors(evidence, batch) for batch in (wide, tall)]

    def say(speaker: Any, inputs: dict[str, Any]) -> np.ndarray:
        with torch.no_grad():
            out = call("model", speaker.generate, **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                       output_logits=True, return_dict_in_generate=True)  # fmt: skip
        return np.stack([as_array(one)[0] for one in out.logits])

    def look(speaker: Any, inputs: dict[str, Any]) -> np.ndarray:
        with torch.no_grad():
            return as_array(call("model", speaker, **inputs).logits)[0]

    try:
        fresh = [say(copy.deepcopy(model), one) for one in question]
        seen = [look(copy.deepcopy(model), one) for one in question]
    except UserCodeError as error:
        raise NotAvailable(f"a batch that the small model takes: {error.text[:200]}") from None
    wrong = []
    for first, second, names in ((0, 1, "the wide one, then the tall one"), (1, 0, "the tall one, then the wide one")):
        speaker = copy.deepcopy(model)
        say(speaker, question[first])
        for what, function, alone in (("generate", say, fresh[second]), ("a forward pass", look, seen[second])):
            try:
                difference = float(np.abs(function(speaker, question[second]) - alone).max())
            except UserCodeError as error:
                wrong.append(f"{names}: {what} raised {error.text[:200]}, and does not without the first call")
                continue
            if difference > 1e-3 * max(1.0, float(np.abs(alone).max())):
                wrong.append(
                    f"{names}: logits of {what} on the second differ by {difference:.3g} from those of a model "
                    "that saw only it"
                )
            if what == "generate":
                speaker = copy.deepcopy(model)
                say(speaker, question[first])
    if wrong:
        yield found(
            "V09",
            where=type(tiny.model).__name__,
            evidence="two pictures, one after the other: " + "; ".join(wrong),
            cause="positions (rope_deltas) of the earlier call are used in the later one",
        )
    else:
        yield looked("V09", "generate and forward on a wide and a tall picture, in both orders: the same logits")


def _tensors(evidence: Evidence, batch: Batch) -> dict[str, Any]:
    """Return the tensors of a batch that a model takes, without labels; the kinds of tokens are added where they are missing."""
    import torch

    given = {
        str(key): value
        for key, value in dict(batch.raw).items()
        if hasattr(value, "to") and key not in ("labels", "position_ids")
    }
    token = evidence.image_token_id()
    if "mm_token_type_ids" not in given and batch.grids is not None and token is not None:
        given["mm_token_type_ids"] = (given["input_ids"] == token).long()
    return {key: value.float() if torch.is_floating_point(value) else value for key, value in given.items()}


# ---- V10 ------------------------------------------------------------------------------------------------------------


def not_packed(evidence: Evidence) -> Outcome:
    """V10: rows with pictures are not packed into one, or do not see one another where they are."""
    told = [
        evidence.options.shown(name)
        for name in ("packing", "padding_free")
        if evidence.options.get(name) not in (None, False, "none", "")
    ]
    if evidence.subject.build_trainer is not None:
        with contextlib.suppress(NotAvailable, UserCodeError):
            arguments = evidence.trainer().arguments
            told += [
                f"{name}={arguments[name]!r} of the trainer"
                for name in ("packing", "padding_free")
                if arguments.get(name)
            ]
    pictures = 0
    with contextlib.suppress(NotAvailable, UserCodeError):
        pictures = sum(len(one.pictures) for one in evidence.examples()[:50])
    if told and pictures:
        yield found(
            "V10",
            where=told[0],
            evidence=(
                f"{', '.join(told)}, and rows hold pictures ({pictures} in the first "
                f"{min(50, len(evidence.examples()))} rows)"
            ),
            cause=(
                "several rows become one sequence: positions of image tokens and the borders of attention no "
                "longer fit each row"
            ),
            certainty=0.9,
        )
        return
    if evidence.subject.collate is None or evidence.subject.processor is None:
        if not evidence.options and evidence.subject.build_trainer is None:
            raise NotAvailable("settings['packing'], or collate")
        yield looked("V10", "neither packing nor padding_free is set")
        return
    awkward = evidence.awkward()
    pair = [awkward["short"], awkward["long"]]
    try:
        batch = evidence.collate(
            [one[0] for one in pair], "short+long", [one[1] for one in pair], [one[2] for one in pair]
        )
    except UserCodeError:
        raise NotAvailable("a collator that takes two rows") from None
    borders = {
        str(key): str(getattr(batch.raw[key], "dtype", ""))
        for key in list(batch.raw.keys())
        if str(key).startswith("cu_seq")
    }
    wrong = {key: kind for key, kind in borders.items() if "int32" not in kind}
    if len(batch.ids) != 1 and not wrong:
        yield looked("V10", f"two rows give a batch of {len(batch.ids)}: nothing is packed")
        return
    leak = _leak(evidence, pair, batch) if len(batch.ids) == 1 else ""
    if wrong or leak or not borders:
        yield found(
            "V10",
            where=place_of(evidence.subject.collate),
            evidence=f"two rows give {len(batch.ids)} of {len(batch.ids[0])} tokens"
            + (f"; {', '.join(f'{key} is {kind}, not int32' for key, kind in wrong.items())}" if wrong else "")
            + (f"; {leak}" if leak else "")
            + ("" if borders else "; the batch has no cu_seq_lens: nothing tells attention where a row ends"),
            cause="rows are packed into one sequence and attend to one another",
            certainty=1.0 if leak or wrong else 0.8,
        )
    else:
        yield looked(
            "V10",
            f"two rows are packed into one, with borders {', '.join(borders)}, and give the logits of single rows",
        )


def _leak(evidence: Evidence, pair: list[Any], packed: Batch) -> str:
    """Compare the small model's logits of the second row, packed and alone; "" where they are equal or cannot be had."""
    import torch

    try:
        alone = evidence.collate([pair[1][0]], "long", [pair[1][1]], [pair[1][2]])
        model: Any = evidence.tiny().model
        length = len(alone.ids[0])
        if packed.ids[0][-length:] != alone.ids[0]:
            return ""
        with torch.no_grad():
            outputs = []
            for batch in (packed, alone):
                given = _tensors(evidence, batch)
                given |= {key: batch.raw[key] for key in ("position_ids",) if key in batch.raw.keys()}  # noqa: SIM118
                given = {
                    key: value for key, value in given.items() if not key.startswith(("cu_seq", "max_length", "seq_"))
                }
                outputs.append(as_array(call("model", model, **given).logits)[0, -length:])
    except (NotAvailable, UserCodeError):
        return ""
    difference = float(np.abs(outputs[0] - outputs[1]).max())
    return f"logits of the second row differ by {difference:.3g} from those it has alone" if difference > 1e-3 else ""
