"""Call foreign code tolerantly: whatever signature it has, and with its failures kept apart from ours.

When: wherever a function or class of a `Subject` is called; nothing else in the doctor calls user code.
"""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_OURS = str(Path(__file__).parent.resolve())
_LIBRARIES = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})


class NotAvailable(Exception):  # noqa: N818  nothing went wrong
    """Evidence cannot be made; the text says what it needs."""


class UserCodeError(Exception):
    """Foreign code raised.

    Attributes:
        what: the part that was called: `convert`, `collate`, …
        error: what it raised.
        where: `file.py:12, in collate`, the innermost line of the user's own file.
        line: text of that line.
        made: it was called on rows that the doctor made, which may be of no form that the code ever meets.
    """

    def __init__(self, what: str, error: BaseException, *, subject: str = "") -> None:
        self.what, self.error, self.subject, self.made = what, error, subject, False
        self.where, self.line = own_line(error)
        super().__init__(self.text)

    @property
    def text(self) -> str:
        """What was raised, in one line."""
        message = " ".join(str(self.error).split())[:600]
        return f"{type(self.error).__name__}: {message}" if message else type(self.error).__name__


def own_line(error: BaseException) -> tuple[str, str]:
    """Return place and text of the innermost line of a traceback that is neither of a library nor of the doctor."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if not _foreign(one.filename)]
    if not own:
        return (f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name}" if frames else "", "")
    last = own[-1]
    return f"{last.filename}:{last.lineno}, in {last.name}", (last.line or "").strip()


def _foreign(filename: str) -> bool:
    if filename.startswith("<frozen"):
        return True
    path = str(Path(filename).resolve()) if not filename.startswith("<") else filename
    return path.startswith(_OURS) or path.startswith(_LIBRARIES)


def place_of(function: Any) -> str:
    """Return `file.py:12 (name)` of a function, class or object; its type's name where no source is known."""
    target = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    target = inspect.unwrap(getattr(target, "func", target))
    try:
        file = inspect.getsourcefile(target) or ""
        line = inspect.getsourcelines(target)[1]
    except (TypeError, OSError):
        return getattr(target, "__qualname__", repr(target))
    return f"{file}:{line} ({getattr(target, '__qualname__', '')})"


def call(what: str, function: Callable[..., Any], /, *args: Any, about: str = "", **keywords: Any) -> Any:
    """Call foreign code; whatever it raises comes as `UserCodeError`.

    Input: `what` names the field of the subject, `about` the row it was called on.
    """
    try:
        return function(*args, **keywords)
    except (NotAvailable, UserCodeError):
        raise
    except TimeoutError:
        raise
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        raise UserCodeError(what, error, subject=about) from error


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters that a call must or may give; `{}` where no signature is known."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


_EXAMPLES = ("example", "batch", "feature", "row", "item", "sample", "instance", "data", "rows", "inputs")


def fill(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choose keyword arguments for the parameters of a function or class by their names.

    Input: `given`, canonical name -> value: `processor`, `tokenizer`, `model`, and settings.
    Output: a value for each required parameter that is known by name, and for optional ones that carry the very name of
    `processor`, `tokenizer` or `model`.
    """
    chosen: dict[str, Any] = {}
    for name, parameter in parameters_of(function).items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        bare = name.strip("_").lower()
        known = next((value for key, value in given.items() if key == bare), None)
        if known is None and ("processor" in bare or bare in ("proc", "processing_class")):
            known = given.get("processor")
        if known is None and "tokenizer" in bare:
            known = given.get("tokenizer")
        if known is None and bare in ("config", "cfg") and hasattr(given.get("model"), "config"):
            known = given["model"].config
        if known is not None and (parameter.default is parameter.empty or bare in ("processor", "tokenizer", "model")):
            chosen[name] = known
    return chosen


def build_collator(collate: Any, *, processor: Any, model: Any, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function from a list of examples to a batch.

    Input: `collate`, such a function, an object that can be called, a class, or a function that returns one of these.

    Raises:
        UserCodeError: building it failed.
    """
    given = {
        "processor": processor,
        "tokenizer": getattr(processor, "tokenizer", processor),
        "model": model,
        **settings,
    }
    given = {key: value for key, value in given.items() if value is not None}
    names = list(parameters_of(collate))
    if inspect.isclass(collate):
        keywords = fill(collate, given)
        missing = [
            one.name
            for one in parameters_of(collate).values()
            if one.default is one.empty
            and one.name not in keywords
            and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        ]
        if (
            not keywords
            and not missing
            and any(one.kind == one.VAR_POSITIONAL for one in parameters_of(collate).values())
        ):
            built = call("collate", collate, processor)
        elif missing:  # unknown names: in the order in which collators are usually built
            built = call("collate", collate, *[processor, model][: len(missing) + len(keywords)])
        else:
            built = call("collate", collate, **keywords)
        return built if callable(built) else built.collate
    first = names[0].lower() if names else ""
    if first in ("processor", "proc", "tokenizer", "model") and not any(
        name.lower().startswith(_EXAMPLES) for name in names
    ):
        return call("collate", collate, **fill(collate, given))
    extra = {key: value for key, value in fill(collate, given).items() if key != (names[0] if names else "")}
    if extra:
        return lambda examples: collate(examples, **extra)
    return collate


def call_parse(parse: Callable[..., Any], text: str, width: int, height: int, **more: Any) -> Any:
    """Call the user's parser with the text, and with the picture's size where it takes one; return what it returns."""
    parameters = parameters_of(parse)
    names = [one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    known: dict[str, Any] = {
        "width": width,
        "height": height,
        "w": width,
        "h": height,
        "image_width": width,
        "image_height": height,
    }
    known |= {"img_width": width, "img_height": height, "img_w": width, "img_h": height, "orig_width": width}
    known |= {"orig_height": height, "original_width": width, "original_height": height}
    known |= {
        "size": (width, height),
        "image_size": (width, height),
        "wh": (width, height),
        "resolution_wh": (width, height),
    }
    known |= {"hw": (height, width), **more}
    keywords = {one.name: known[one.name] for one in list(parameters.values())[1:] if one.name in known}
    required = [one for one in names[1:] if one.default is one.empty and one.name not in keywords]
    if len(required) >= 2 and not keywords:
        return call("parse", parse, text, width, height, about=repr(text[:200]))
    if len(required) == 1 and not keywords:
        return call("parse", parse, text, (width, height), about=repr(text[:200]))
    return call("parse", parse, text, about=repr(text[:200]), **keywords)


_BOX_KEYS = ("bbox_2d", "bbox", "box", "box_2d", "xyxy", "boxes", "bboxes", "coordinates")
_LABEL_KEYS = ("label", "category", "class", "name", "category_name", "labels", "text")


def as_boxes(value: Any) -> list[tuple[str | None, list[float]]]:
    """Read what a parser returned, or one entry of predictions, into (label, four numbers).

    Input: list of boxes, list of dicts, `(boxes, labels)`, `{"boxes", "labels"}`, an object with `boxes` and `labels`, arrays
    or tensors; None is no box.

    Raises:
        NotAvailable: of no such form.
    """
    if value is None:
        return []
    if hasattr(value, "boxes"):
        value = {"boxes": getattr(value.boxes, "xyxy", value.boxes), "labels": getattr(value, "labels", None)}
    if hasattr(value, "xyxy"):
        value = value.xyxy
    if isinstance(value, Mapping):
        boxes = next((value[key] for key in ("boxes", "bboxes", *_BOX_KEYS) if key in value), None)
        if boxes is None:
            raise NotAvailable(f"boxes in a form that is known, not {str(value)[:80]}")
        boxes = plain(boxes)
        labels = plain(next((value[key] for key in ("labels", *_LABEL_KEYS) if value.get(key) is not None), None))
        if boxes and not isinstance(boxes[0], (list, tuple)):
            boxes = [boxes]
        if labels is None or isinstance(labels, str):
            labels = [labels] * len(boxes)
        return [(_label(label), _four(box)) for label, box in zip(labels, boxes, strict=False)]
    value = plain(value)
    if isinstance(value, tuple) and len(value) == 2 and not _is_number(value[0]):
        first, second = plain(value[0]), plain(value[1])
        if first is not None and (
            not second or not _is_box(second[0] if isinstance(second, (list, tuple)) else second)
        ):
            labels = second if isinstance(second, (list, tuple)) and len(second) == len(first) else [None] * len(first)
            return [(_label(label), _four(box)) for label, box in zip(labels, first, strict=False)]
    if not isinstance(value, (list, tuple)):
        raise NotAvailable(f"boxes in a form that is known, not {str(value)[:80]}")
    if value and _is_box(value):
        return [(None, _four(value))]
    boxes_out: list[tuple[str | None, list[float]]] = []
    for one in value:
        one = plain(one)
        if isinstance(one, Mapping) or hasattr(one, "boxes"):
            boxes_out.extend(as_boxes(one))
        elif _is_box(one):
            boxes_out.append((None, _four(one)))
        elif isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[0], str):
            boxes_out.append((one[0], _four(plain(one[1]))))
        elif isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[1], str):
            boxes_out.append((one[1], _four(plain(one[0]))))
        elif isinstance(one, (list, tuple)) and len(one) >= 5 and isinstance(one[0], str):
            boxes_out.append((one[0], _four(one[1:5])))
        elif isinstance(one, (list, tuple)) and len(one) >= 5 and all(map(_is_number, one[:4])):
            boxes_out.append((one[-1] if isinstance(one[-1], str) else None, _four(one[:4])))
        elif (
            isinstance(one, (list, tuple))
            and len(one) == 2
            and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in one)
        ):
            boxes_out.append((None, _four([*one[0], *one[1]])))
        else:
            raise NotAvailable(f"boxes in a form that is known, not {str(one)[:80]}")
    return boxes_out


def plain(value: Any) -> Any:
    """Turn tensors and arrays into lists; anything else comes back as it is."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _is_box(value: Any) -> bool:
    value = plain(value)
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_number, map(plain, value)))


def _four(value: Any) -> list[float]:
    value = plain(value)
    try:
        numbers = [float(plain(one)) for one in value]
    except (TypeError, ValueError) as error:
        raise NotAvailable(f"boxes of four numbers, not {str(value)[:80]}") from error
    if len(numbers) != 4:
        raise NotAvailable(f"boxes of four numbers, not {str(value)[:80]}")
    return numbers


def _label(value: Any) -> str | None:
    return None if value is None else str(value)


def number_of(value: Any) -> float:
    """Return the main figure of what a metric returned: a number, the first number of a dict, or of a tuple.

    Raises:
        NotAvailable: there is no number.
    """
    value = plain(value)
    if _is_number(value):
        return float(value)
    if isinstance(value, Mapping):
        numbers = {str(key).lower(): plain(one) for key, one in value.items() if _is_number(plain(one))}
        for wanted in (
            "f1",
            "f1_50",
            "f1@0.5",
            "map",
            "ap50",
            "map_50",
            "mean_iou",
            "miou",
            "iou",
            "score",
            "accuracy",
        ):
            if wanted in numbers:
                return float(numbers[wanted])
        if numbers:
            return float(next(iter(numbers.values())))
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return number_of(value[0])
    raise NotAvailable(f"a metric that returns a number, not {str(value)[:80]}")
