"""Ground truths, in whichever form a data set writes them."""

import json
import re
from typing import Any

from gvpo.rewards.extraction import boxed_contents


def hash_answer(text: str) -> str | None:
    """The number after `####` in a GSM8K solution, without thousands separators; None when there is none."""
    found = re.search(r"####\s*(-?[\d.,]*\d)\s*$", text.strip())
    return found.group(1).replace(",", "") if found else None


def boxed_answer(text: str) -> str | None:
    """The content of the last `\\boxed{}` of a MATH solution; None when there is none."""
    boxes = boxed_contents(text)
    return boxes[-1].strip() or None if boxes else None


def any_answer(value: Any) -> str | None:
    """A ground truth in whichever form it is written.

    `#### 72` and `\\boxed{72}` are reduced to `72`, a whole float to an integer, `$72$` to `72`. A list
    stands for answers each of which is right: one is taken as it is, several are kept as a JSON list.
    """
    if isinstance(value, list):
        parts = list(dict.fromkeys(part for part in map(any_answer, value) if part))
        if len(parts) > 1:
            return json.dumps(parts, ensure_ascii=False)
        return parts[0] if parts else None
    if value is None or isinstance(value, bool | dict):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value).strip()
    if "####" in text:
        return hash_answer(text)
    if "\\boxed" in text:
        return boxed_answer(text)
    single_formula = re.fullmatch(r"\$([^$]+)\$\.?", text)
    text = single_formula.group(1).strip() if single_formula else text
    balanced = re.sub(r"\\[{}]", "", text)
    # A formula cut in the middle cannot be parsed, and is not guessed at.
    return text if text and balanced.count("{") == balanced.count("}") else None
