"""Traces of the `verifiers` library as logged episodes, which GVPO learns from without generation.

    pip install verifiers
    python examples/verifiers_traces.py traces.jsonl logged.jsonl
    gvpo train --model_name_or_path … --offline logged.jsonl --reference initial --num_generations 8

The traces must be from verifiers' training client, which keeps token ids and which of them were sampled. The
traces of a task make a group. Left out are traces with an error, and those of several branches (an agent that
rewrote its context), which `GVPOTrainer` has no place for; a task with a single other has nothing to compare.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from verifiers.v1.trace import Trace


def episode(trace: Trace) -> dict | None:
    """The columns of one completion."""
    branches = [branch for branch in trace.branches if branch.trainable and any(branch.sampled_mask)]
    if trace.has_error or len(branches) != 1:
        return None
    ids, own = branches[0].token_ids, branches[0].sampled_mask
    start = own.index(True)
    return {
        "prompt_ids": ids[:start],
        "completion_ids": ids[start:],
        "counted": own[start:],
        "rewards": trace.reward,
    }


def main(traces: Path, output: Path) -> None:
    groups, left_out = defaultdict(list), 0
    for line in traces.read_text().splitlines():
        trace = Trace.model_validate_json(line)
        if (found := episode(trace)) is None:
            left_out += 1
        else:
            groups[trace.task.key or trace.task.hash].append(found)
    whole = [group for group in groups.values() if len(group) > 1]
    with open(output, "w") as file:
        for group in whole:
            file.write(json.dumps({name: [row[name] for row in group] for name in group[0]}) + "\n")
    alone, kept = len(groups) - len(whole), sum(map(len, whole))
    print(f"{len(whole)} groups of {kept} episodes; {left_out} traces and {alone} tasks left out.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="a line of JSON a trace")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    main(arguments.traces, arguments.output)
