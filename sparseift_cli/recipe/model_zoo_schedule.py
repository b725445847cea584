"""Optimiser and learning rate of a Model Zoo configuration, in either generation of the format."""

from __future__ import annotations

from typing import Any

from .foreign import Foreign

_ADAM = {"betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
_SGD = {"momentum": "momentum", "nesterov": "nesterov", "weight_decay": "weight_decay"}


def read(file: Foreign, *, new: bool, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections `optimizer` and `schedule`."""
    if new:
        found = file.find("trainer.init.optimizer")
        kinds = list(found.data) if found and isinstance(found.data, dict) else []
        kind, at = (kinds[0], f"trainer.init.optimizer.{kinds[0]}") if kinds else ("AdamW", "trainer.init.optimizer")
        rates = "trainer.init.schedulers"
    else:
        kind, at, rates = file.take("optimizer.optimizer_type") or "AdamW", "optimizer", "optimizer.learning_rate"
    optimizer = _optimizer(file, str(kind), at)
    constant = file.take(f"{at}.learning_rate") if new else None
    schedule, peak = _schedule(file, rates, steps)
    peak = peak if peak is not None else constant
    if peak is not None:
        optimizer["lr"] = peak
    return optimizer, schedule


def _optimizer(file: Foreign, kind: str, at: str) -> dict[str, Any]:
    sgd = kind.lower() == "sgd"
    if not sgd and kind.lower() != "adamw":
        file.note(at if at != "optimizer" else "optimizer.optimizer_type", f"{kind} is not there; adamw is written")
    found: dict[str, Any] = {"name": "sgd" if sgd else "adamw"}
    for key, ours in (_SGD if sgd else _ADAM).items():
        value = file.take(f"{at}.{key}")
        if value is not None:
            found[ours] = value
    file.expect(f"{at}.correct_bias", True, "AdamW always corrects its bias")
    return found


def _schedule(file: Foreign, at: str, steps: int) -> tuple[dict[str, Any], float | None]:
    """The section, and the peak learning rate."""
    found = file.find(at)
    if found is None:
        return {"name": "constant"}, None
    plain = file.take(at)
    if isinstance(plain, int | float):
        return {"name": "constant"}, float(plain)
    phases = _phases(plain)
    warmup: int | None = None
    if len(phases) > 1 and phases[0][0] == "linear" and not phases[0][1].get("initial_learning_rate"):
        warmup = phases[0][1].get("total_iters")
        phases = phases[1:]
    if len(phases) != 1 or phases[0][0] not in ("cosine", "linear", "constant"):
        file.note(at, "only a warm-up and then a cosine, a line or a constant can be said here; a cosine is written")
    kind, options = phases[0] if phases and phases[0][0] in ("cosine", "linear", "constant") else ("cosine", {})
    peak = options.get("initial_learning_rate", options.get("learning_rate", options.get("val")))
    length = options.get("total_iters")
    if kind != "constant" and length is not None and length + (warmup or 0) != steps:
        file.note(
            at,
            f"warm-up and decay take {length + (warmup or 0):,} steps, the run {steps:,}; here the decay ends with it",
        )
    section: dict[str, Any] = {"name": kind, **({"warmup": f"{warmup} steps"} if warmup else {})}
    if kind != "constant" and options.get("end_learning_rate"):
        section["final_lr"] = options["end_learning_rate"]
    return section, None if peak is None else float(peak)


def _phases(plain: Any) -> list[tuple[str, dict[str, Any]]]:
    """(kind, options) one after another: `SequentialLR` unfolded, `CosineDecayLR` and `scheduler: CosineDecay` alike."""
    if isinstance(plain, list):
        return [phase for item in plain for phase in _phases(item)]
    if not isinstance(plain, dict):
        return []
    if "scheduler" in plain:
        return [(_kind(str(plain["scheduler"])), plain)]
    phases: list[tuple[str, dict[str, Any]]] = []
    for name, options in plain.items():
        inner = options if isinstance(options, dict) else {}
        phases += (
            _phases(inner["schedulers"])
            if name.startswith("Sequential") and "schedulers" in inner
            else [(_kind(name), inner)]
        )
    return phases


def _kind(name: str) -> str:
    word = name.lower().removesuffix("lr")
    return {"cosinedecay": "cosine", "linear": "linear", "constant": "constant"}.get(word, word)
