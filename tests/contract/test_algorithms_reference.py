"""Every algorithm against a slow reference in plain Python lists, written from the papers' equations, step by step.

The net is linear-tanh-linear with a mean squared error, in float64; the reference has its own forward pass, its own
backward pass and its own optimisers. After every step: masks equal, weights equal to rounding, non-zeros as scheduled,
inactive weights and optimiser state exactly zero. Scores that are equal in float32 (weights that a dead unit leaves at
zero, Adam's first steps) are ties: there the reference chooses as the masks under test do, which is as good as any.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from math import cos, floor, pi, sqrt, tanh

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.base.randomness import generator_for, key_of
from sparseift_cli.mask.attached import attach
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.sparsity.sparsifier import Sparsifier

Matrix = list[list[float]]
INPUTS, HIDDEN, OUTPUTS, BATCH = 6, 9, 4, 3
FINAL = {"0.weight": 14, "2.weight": 9}
STEPS, DELTA, STOP = 32, 3, Fraction(3, 4)

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.2, "weight_decay": 0.01}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}


def splitmix(key: int, counter: int) -> int:
    """The word of a counter: splitmix64's finaliser (Steele, Lea, Flood 2014) over counter times 2^64 / golden ratio, plus key."""
    z = (counter * 0x9E3779B97F4A7C15 + key) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(INPUTS, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS, bias=False))
        generator = generator_for(1, "weights")
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(generator=generator)


def data(step: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = generator_for(2, str(step), str(micro))
    x = torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.randn(BATCH, OUTPUTS, generator=generator, dtype=torch.float64)


# --- the reference ---


def single(value: float) -> float:
    """Rounded to float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def gradients(w: dict[str, Matrix], x: Matrix, y: Matrix) -> dict[str, Matrix]:
    """Of mean (W2 tanh(W1 x) - y)^2, by hand."""
    w1, w2 = w["0.weight"], w["2.weight"]
    g1 = [[0.0] * INPUTS for _ in range(HIDDEN)]
    g2 = [[0.0] * HIDDEN for _ in range(OUTPUTS)]
    for b in range(len(x)):
        h = [tanh(sum(w1[j][i] * x[b][i] for i in range(INPUTS))) for j in range(HIDDEN)]
        out = [sum(w2[k][j] * h[j] for j in range(HIDDEN)) for k in range(OUTPUTS)]
        d = [2 * (out[k] - y[b][k]) / (len(x) * OUTPUTS) for k in range(OUTPUTS)]
        for k in range(OUTPUTS):
            for j in range(HIDDEN):
                g2[k][j] += d[k] * h[j]
        for j in range(HIDDEN):
            back = sum(d[k] * w2[k][j] for k in range(OUTPUTS)) * (1 - h[j] ** 2)
            for i in range(INPUTS):
                g1[j][i] += back * x[b][i]
    return {"0.weight": g1, "2.weight": g2}


class Reference:
    """Weights, masks and state of one run; everything is flat lists, a place is an index."""

    def __init__(self, algorithm: str, optimizer: str, regrow: str, decay: str, clip: float | None, start: Net) -> None:
        self.algorithm, self.regrow, self.decay, self.clip = algorithm, regrow, decay, clip
        self.kind, self.options = optimizer, OPTIMIZERS[optimizer][1]
        self.w = {name: p.detach().flatten().tolist() for name, p in start.named_parameters()}
        self.shape = {name: tuple(p.shape) for name, p in start.named_parameters()}
        self.mask = {
            name: {i for i, on in enumerate(start.get_buffer(name + "_mask").flatten().tolist()) if on}
            for name in self.w
        }
        self.m = {name: [0.0] * len(w) for name, w in self.w.items()}
        self.v = {name: [0.0] * len(w) for name, w in self.w.items()}
        self.mean = {name: [0.0] * len(w) for name, w in self.w.items()}  # SNFS: of past dense gradients
        self.taken = 0  # optimiser steps

    def matrix(self, name: str) -> Matrix:
        rows, columns = self.shape[name]
        return [self.w[name][r * columns : (r + 1) * columns] for r in range(rows)]

    def nonzeros(self, name: str, t: int) -> int:
        """Zhu & Gupta 2017, eq. 1, of densities as they stand there, in exact fractions."""
        places, final = len(self.w[name]), FINAL[name]
        start = {"gmp": Fraction(1), "granet": Fraction(1, 2)}.get(self.algorithm)
        if start is None:
            return final
        first = max(final, floor(start * places))
        if t >= STOP * STEPS:
            return final
        progress = Fraction(t // DELTA * DELTA) / (STOP * STEPS)
        return floor(final + (first - final) * (1 - progress) ** 3)

    def step(self, t: int, micro: list[tuple[Tensor, Tensor]], skip: bool, tested: dict[str, set[int]]) -> None:
        self.tested = tested
        dense = {name: [0.0] * len(w) for name, w in self.w.items()}
        for x, y in micro:
            found = gradients({name: self.matrix(name) for name in self.w}, x.tolist(), y.tolist())
            for name, g in found.items():
                for i, value in enumerate(v for row in g for v in row):
                    dense[name][i] += value / len(micro)
        for name in self.w:  # pruning, towards the next step
            while len(self.mask[name]) > self.nonzeros(name, t + 1):
                self.drop(name, self.smallest(name)[0])
        masked = {name: [v if i in self.mask[name] else 0.0 for i, v in enumerate(g)] for name, g in dense.items()}
        if skip:
            return
        if self.clip is not None:
            norm = sqrt(sum(v * v for g in masked.values() for v in g))
            scale = min(1.0, self.clip / (norm + 1e-6))
            masked = {name: [v * scale for v in g] for name, g in masked.items()}
        self.taken += 1
        for name, g in masked.items():
            for i in range(len(g)):
                self.optimise(name, i, g[i])
        for name, g in dense.items():
            self.mean[name] = [single(single(0.9 * m) + 0.1 * v) for m, v in zip(self.mean[name], g, strict=True)]
        if self.algorithm in ("set", "rigl", "granet", "snfs") and 0 < t < STOP * STEPS and t % DELTA == 0:
            for name in self.w:
                self.exchange(name, t, dense[name])

    def optimise(self, name: str, i: int, g: float) -> None:
        o, w, m, v = self.options, self.w[name], self.m[name], self.v[name]
        if self.kind == "adamw":
            w[i] -= o["lr"] * o["weight_decay"] * w[i]
        else:
            g += o["weight_decay"] * w[i]
        if self.kind in ("adam", "adamw"):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            mean, square = m[i] / (1 - 0.9**self.taken), v[i] / (1 - 0.999**self.taken)
            w[i] -= o["lr"] * mean / (sqrt(square) + 1e-8)
            return
        if self.kind != "sgd":
            m[i] = 0.9 * m[i] + g
            g = g + 0.9 * m[i] if self.kind == "nesterov" else m[i]
        w[i] -= o["lr"] * g

    def exchange(self, name: str, t: int, dense: list[float]) -> None:
        """Evci et al. 2020, algorithm 1: ArgTopK(-|w|, k), then ArgTopK over what is not active any more; grown at zero."""
        x = t / float(STOP * STEPS)
        fraction = {
            "cosine": 0.25 * (1 + cos(pi * x)),
            "linear": 0.5 * (1 - x),
            "inverse_power": 0.5 * (1 - x) ** 3,
            "constant": 0.5,
        }[self.decay]
        mask, size = self.mask[name], len(self.w[name])
        n = floor(fraction * len(mask))
        if self.regrow == "forbid":
            n = min(n, size - len(mask))
        if self.algorithm == "set":
            key = key_of(0, name, "grow", t)
            score = [-single((splitmix(key, i) & (2**63 - 1)) / 2**63) for i in range(size)]
        else:  # Dettmers & Zettlemoyer 2019, algorithm 1: by the momentum of the dense gradient
            score = [abs(g) for g in (self.mean[name] if self.algorithm == "snfs" else dense)]
        dropped = set(self.smallest(name)[:n])
        free = [i for i in range(size) if i not in mask or (self.regrow == "allow" and i in dropped)]
        grown = set(sorted(free, key=lambda i: (-single(score[i]), i not in self.tested[name]))[:n])
        for i in dropped - grown:
            self.drop(name, i)
        for i in grown - mask:
            mask.add(i)
            self.w[name][i] = 0.0

    def smallest(self, name: str) -> list[int]:
        """Active places by |w|; of equal ones those first that the masks under test have not."""
        return sorted(self.mask[name], key=lambda i: (single(abs(self.w[name][i])), i in self.tested[name]))

    def drop(self, name: str, i: int) -> None:
        self.mask[name].discard(i)
        self.w[name][i] = self.m[name][i] = self.v[name][i] = 0.0


# --- side by side ---


def run_both(
    algorithm: str,
    optimizer: str,
    *,
    regrow: str = "allow",
    decay: str = "cosine",
    accumulate: int = 1,
    clip: float | None = None,
    skips: tuple[int, ...] = (),
    foreach: bool | None = None,
) -> None:
    net = Net()
    attach(net, {n: make_mask(net.get_parameter(n).shape, k, generator=generator_for(3, n)) for n, k in FINAL.items()})
    cls, options = OPTIMIZERS[optimizer]
    opt = cls(net.parameters(), **options, foreach=foreach)
    sparsifier = Sparsifier(
        net,
        opt,
        algorithm=algorithm,
        total_steps=STEPS,
        delta_t=DELTA,
        stop=STOP,
        drop_fraction=0.5,
        schedule=decay,
        regrow=regrow,
    )
    reference = Reference(algorithm, optimizer, regrow, decay, clip, net)
    moved = 0
    for t in range(STEPS):
        for name in FINAL:
            assert sparsifier.nnz[name] == len(reference.mask[name]) == reference.nonzeros(name, t)
        before = {name: set(mask) for name, mask in reference.mask.items()}
        micro = [data(t, i) for i in range(accumulate)]
        opt.zero_grad()
        for x, y in micro:
            (nn.functional.mse_loss(net(x), y) / accumulate).backward()
        assert sparsifier.step()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if t not in skips:
            opt.step()
        tested = {name: set(mask.flatten().nonzero().flatten().tolist()) for name, mask in sparsifier.masks().items()}
        reference.step(t, micro, t in skips, tested)
        for name, p in net.named_parameters():
            mask = net.get_buffer(name + "_mask")
            assert tested[name] == reference.mask[name], (t, name)
            torch.testing.assert_close(
                p.detach().flatten(), torch.tensor(reference.w[name], dtype=torch.float64), rtol=1e-9, atol=1e-11
            )
            state = [v for v in opt.state[p].values() if isinstance(v, Tensor) and v.shape == p.shape]
            assert all(not tensor[~mask].any() for tensor in (p.detach(), *state))
            assert len(state) == (0 if optimizer == "sgd" else 1 if "adam" not in optimizer else 2) or t in skips
        moved += any(before[name] != reference.mask[name] for name in FINAL)
    assert {w.name: w.nnz for w in sparsifier.weights} == (FINAL if algorithm != "dense" else sparsifier.nnz)
    assert moved > 2 or algorithm in ("static", "dense")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("algorithm", ["static", "set", "snfs", "rigl", "gmp", "granet"])
def test_every_algorithm_and_optimiser(algorithm: str, optimizer: str) -> None:
    run_both(algorithm, optimizer)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("algorithm", ["set", "snfs", "rigl", "gmp", "granet"])
def test_accumulation_clipping_and_skips(algorithm: str, optimizer: str) -> None:
    """Steps 5 (before an update), 6, 12 (updates) and 23 (before the last pruning) are skipped, as fp16 would."""
    run_both(algorithm, optimizer, accumulate=3, clip=0.05, skips=(5, 6, 12, 23), regrow="forbid")


@pytest.mark.parametrize("decay", ["constant", "linear", "inverse_power"])
@pytest.mark.parametrize("regrow", ["allow", "forbid"])
def test_schedules_of_the_drop_fraction(decay: str, regrow: str) -> None:
    run_both("rigl", "momentum", decay=decay, regrow=regrow)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_and_for_loop(optimizer: str, foreach: bool) -> None:
    run_both("granet", optimizer, foreach=foreach)
