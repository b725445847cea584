"""Transforms every model of a set with every member, one process a model, and writes what came of it as a table.

    python -m tests.tools.survey torchvision --out tests/tools/survey/torchvision.md
    python -m tests.tools.survey timm others --jobs 16 --json survey.jsonl
    python -m tests.tools.survey transformers --only gpt2 t5

For each model, member and sparsity: traced, planned, transformed and counted again on the meta device; models of up to 20
million parameters also run forward and backward on CPU tensors. A model is *wrong* when a transform breaks, costs other than
planned, is a non-zero or more off the budget in any row, changes the shape of an output, or is not finite. It is *full* when
both sides of every body layer grow under Sparse Wide, *half* when some do not, *refused* when Wide says no, always with the
reason; *broken* is a model that cannot be built or does not run before anything is done to it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparseift_cli.plan.members import MEMBERS

from .examine import SPARSITIES, Outcome, examine
from .families import SETS
from .subject import Subject

SECONDS = 400  # for one model
WIDEST = 200  # characters of a remark


def run(subjects: list[Subject], jobs: int, real: bool) -> Iterator[dict[str, Any]]:
    """The outcomes as they come, each from a fork of this process: a crash or a leak of one model touches no other."""
    waiting, running = list(reversed(subjects)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            subject = waiting.pop()
            running[_start(subject, real)] = (subject, bytearray())
        for pipe in select.select(list(running), [], [])[0]:
            subject, data = running[pipe]
            if chunk := os.read(pipe, 1 << 16):
                data += chunk
                continue
            os.close(pipe)
            os.wait()
            del running[pipe]
            yield json.loads(data) if data else _killed(subject)


def _start(subject: Subject, real: bool) -> int:
    """Examine one model in a fork; the returned pipe gives its outcome as JSON, or nothing if it was killed."""
    receive, send = os.pipe()
    if os.fork() == 0:
        os.close(receive)
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # models that print
        with os.fdopen(send, "w", encoding="utf-8") as pipe:
            json.dump(examine(subject, real).to_json(), pipe)
        os._exit(0)
    os.close(send)
    return receive


def _killed(subject: Subject) -> dict[str, Any]:
    outcome = Outcome(subject.name, subject.set)
    outcome.wrong.append(f"killed, or not done in {SECONDS} s")
    return outcome.to_json()


def report(outcomes: list[dict[str, Any]], what: str) -> str:
    """The table, as Markdown."""
    columns = [
        "model",
        "verdict",
        *MEMBERS,
        "body reached",
        "MACs / PyTorch's",
        "of a step",
        "real",
        "preserve",
        "seconds",
        "remarks",
    ]
    lines = [
        f"# {what}: {len(outcomes)} models, four members, s = {' and '.join(SPARSITIES)}",
        "",
        f"Written by `python -m tests.tools.survey {what}` (torch {', '.join({o['torch'] for o in outcomes})}). "
        + " ".join((__doc__ or "").split("\n\n")[2].split()),
        "",
        f"| {' | '.join(columns)} |",
        f"| --- | --- |{' ---: |' * (len(columns) - 3)} --- |",
        *(_row(o) for o in sorted(outcomes, key=lambda o: o["name"])),
        "",
        *summary(outcomes),
        "",
    ]
    return "\n".join(lines)


def _row(o: dict[str, Any]) -> str:
    held = [f"{n} layers held by: {reason}" for reason, n in o["held"].items()]
    said = dict.fromkeys([*filter(None, [o["error"]]), *o["wrong"], *o["refused"], *held])
    remarks = "; ".join(text if len(text) <= WIDEST else f"{text[:WIDEST]}..." for text in said)
    passed = [f"{o['passed'].get(m, 0)}/{len(SPARSITIES)}" for m in MEMBERS]
    against = "" if not o["torch_macs"] else f"{o['macs'] / o['torch_macs']:.4f}"
    step = "" if not o["torch_training_macs"] else f"{o['training_macs'] / o['torch_training_macs']:.4f}"
    real = f"{o['real']}/{len(MEMBERS.names)}" if o["real"] else ""
    kept = "" if o["deviation"] is None else f"{o['deviation']:.0e}"
    verdict = o["verdict"] + (" (justified)" if o["verdict"] in ("half", "refused") and o["justified"] else "")
    cells = [o["name"], verdict, *passed, f"{o['reached']:.0%}", against, step, real, kept, f"{o['seconds']:.1f}"]
    return f"| {' | '.join(cells)} | {remarks.replace('|', '/')} |"


def summary(outcomes: list[dict[str, Any]]) -> list[str]:
    """How many models came to which verdict, and how many of those that are not justified refusals are full."""
    verdicts = Counter(o["verdict"] for o in outcomes)
    counted = [
        o for o in outcomes if o["verdict"] != "broken" and not (o["justified"] and o["verdict"] in ("half", "refused"))
    ]
    full = sum(o["verdict"] == "full" for o in counted)
    sums = [f"{m} {sum(o['passed'].get(m, 0) == len(SPARSITIES) for o in outcomes)}/{len(outcomes)}" for m in MEMBERS]
    return [
        f"Verdicts: {', '.join(f'{v} {n}' for v, n in sorted(verdicts.items()))}. Full of those without a justified reason: "
        f"{full}/{len(counted)} ({full / max(1, len(counted)):.0%}).",
        f"Models that pass at every sparsity: {', '.join(sums)}. "
        f"Real runs: {sum(o['real'] == len(MEMBERS.names) for o in outcomes)} models with all members.",
    ]


def examine_all(subjects: list[Subject], jobs: int, *, real: bool, log: Path | None) -> list[dict[str, Any]]:
    """Every outcome, printed on stderr and appended to `log` as it comes."""
    outcomes, start = [], time.perf_counter()
    for outcome in run(subjects, jobs, real):
        outcomes.append(outcome)
        if log:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")
        problem = outcome["error"] or outcome["wrong"] or outcome["refused"] or outcome["held"] or ""
        print(
            f"[{len(outcomes)}/{len(subjects)} {time.perf_counter() - start:.0f} s] {outcome['name']}: "
            f"{outcome['verdict']} {str(problem)[:300]}",
            file=sys.stderr,
        )
    return outcomes


def main() -> None:
    """Run sets and write their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--no-real", action="store_true", help="nothing on CPU tensors")
    parser.add_argument(
        "--from", dest="done", type=Path, metavar="JSON", help="outcomes of an earlier run; nothing is run"
    )
    parser.add_argument("--out", type=Path, help="the table, as Markdown")
    parser.add_argument("--json", type=Path, help="one line a model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    subjects = [
        replace(s, set=name)
        for name in options.sets
        for s in SETS[name]()
        if not options.only or s.name in options.only
    ]
    if options.done:
        lines = map(json.loads, options.done.read_text("utf-8").splitlines())
        outcomes = [outcome for outcome in lines if outcome["set"] in options.sets]
    else:
        outcomes = examine_all(subjects, options.jobs, real=not options.no_real, log=options.json)
    text = report(outcomes, " ".join(options.sets))
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print("\n".join(summary(outcomes)) if options.out else text)


if __name__ == "__main__":
    main()
