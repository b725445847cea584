"""FLOPs a second of a whole run, and which part of what its device can do: useful ones, and those that were executed.

Useful FLOPs are those that the masks leave, as audited and counted step by step (`flops` in metrics.jsonl); executed ones are
what the device multiplied, zeros too (`executed_flops`). Both are of training, over the wall time of the whole run with its
compilation and evaluations, so a step alone is faster. MFU, model FLOPs utilisation, is the share of the peak (Chowdhery et al.
2022, "PaLM: Scaling Language Modeling with Pathways", appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PEAKS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
}
"""TFLOP/s of dense bf16 and fp16 products with fp32 sums by NVIDIA's data sheets, by the name that PyTorch gives the device."""
_KNOWN_FOR = ("bf16", "fp16")  # fp32 may be computed as TF32 or not, which no recipe says


@dataclass(frozen=True, slots=True)
class Rate:
    """A column: its name, its short heading with the unit, and what it is called in a sentence."""

    name: str
    head: str
    title: str
    unit: str
    of: str
    """The column with the FLOPs."""
    share: bool
    """Whether it is a share of the peak, in per cent, not TFLOP/s."""


RATES = (
    Rate("useful_tflops", "useful TF/s", "useful", " TFLOP/s", "flops_spent", share=False),
    Rate("executed_tflops", "executed TF/s", "executed", " TFLOP/s", "flops_executed", share=False),
    Rate("useful_mfu", "useful MFU %", "useful MFU", " %", "flops_spent", share=True),
    Rate("executed_mfu", "executed MFU %", "executed MFU", " %", "flops_executed", share=True),
)
"""Every rate, in the order in which tables show them: the one place for their names, units and headings."""


def rates(row: Mapping[str, Any], peak: float | None) -> dict[str, float | None]:
    """The rates of a run from its row of costs; None where FLOPs, seconds or the peak are not known.

    >>> found = rates({"flops_spent": 6 * 10**12, "flops_executed": None, "seconds": 3.0}, 8.0)
    >>> found["useful_tflops"], found["useful_mfu"], found["executed_mfu"]
    (2.0, 25.0, None)

    Args:
        row: flops_spent, flops_executed and seconds of a run.
        peak: TFLOP/s of all its devices together.
    """
    found: dict[str, float | None] = {}
    for rate in RATES:
        flops, seconds = row[rate.of], row["seconds"]
        tflops = flops / seconds / 1e12 if flops is not None and seconds and seconds > 0 else None
        found[rate.name] = (100 * tflops / peak if tflops is not None and peak else None) if rate.share else tflops
    return found


def peak_of(session: Mapping[str, Any], precision: str | None, given: float | None) -> float | None:
    """TFLOP/s that the devices of a session can do together; None where the data sheet's number is not known here.

    Args:
        session: an entry of provenance.json.
        precision: training.precision of the run.
        given: of one device, in place of the data sheet's number.
    """
    of_one = given or (_PEAKS.get(str(session.get("device_name"))) if precision in _KNOWN_FOR else None)
    processes = session.get("processes")
    return of_one and of_one * (processes if isinstance(processes, int) and processes > 0 else 1)
