"""How old the responses of a batch are, and the references that they are measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

Spans = Mapping[str, Sequence[tuple[int, int]]]


def staleness(spans: Spans, ages: Mapping[str, int], reference_ages: Mapping[str, int]) -> dict[str, float]:
    """What is logged of it.

    Args:
        spans: of each prompt the versions with which each response was begun and ended.
        ages: of each prompt's group: updates since the version of its oldest response.
        reference_ages: the same of the version that the group is measured against.

    Returns:
        `age_mean`, `age_max` and `reference_age`, in updates; `mixed_groups`, the share of groups with
        responses of several versions; `spanning_rows`, the share of responses that no single version made.
    """
    if not spans:
        return {}
    rows = [span for group in spans.values() for span in group]
    mixed = [len({version for span in group for version in span}) > 1 for group in spans.values()]
    found = {
        "staleness/age_mean": fmean(ages[prompt] for prompt in spans),
        "staleness/age_max": float(max(ages[prompt] for prompt in spans)),
        "staleness/mixed_groups": fmean(mixed),
        "staleness/spanning_rows": fmean(oldest != newest for oldest, newest in rows),
    }
    if reference_ages:
        found["staleness/reference_age"] = fmean(reference_ages[prompt] for prompt in spans)
    return found
