"""Recipes of a few seconds: made-up images, a small net, every algorithm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sparseift_cli.sparsity.algorithms import ALGORITHMS

RECIPE = """
model: {{name: "tests.helpers.nets:{net}", input: 3x8x8}}
data: synthetic-images
{transform}
optimizer: {optimizer}
schedule: {{name: cosine, warmup: 2}}
training: {{steps: {steps}, batch_size: 16, clip: 1.0, device: cpu}}
evaluation: {{every: 5, metrics: [top1, loss], limit: 32}}
checkpoint: {{every: {save}, keep: 100}}
"""
OPTIMIZERS = {
    "sgd": "{name: sgd, lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}",
    "adamw": "{name: adamw, lr: 3.0e-3, weight_decay: 0.1}",
}


@pytest.fixture(scope="session")
def write_recipe_in() -> Callable[[Path], Callable[..., Path]]:
    """`write_recipe_in(folder)("rigl", "sgd", steps=12)`: a recipe file in `folder`; dense where the algorithm is None."""

    def write_in(
        folder: Path,
        algorithm: str | None,
        optimizer: str = "sgd",
        *,
        steps: int = 12,
        save: int = 100,
        net: str = "cnn",
        more: str = "",
    ) -> Path:
        transform = ""
        if algorithm:
            scheduled = "delta_t" in ALGORITHMS.get(algorithm).option_names()
            schedule = ", delta_t: 2, stop: 0.75" if scheduled else ""
            transform = (
                f"transform: {{member: wide, match: {'layer' if net == 'mlp' else 'model'}}}\nsparsity: 0.75\n"
                f'algorithm: {{name: "{algorithm}"{schedule}}}'
            )
        path = folder / f"{(algorithm or 'dense').rpartition(':')[2]}_{optimizer}.yaml"
        path.write_text(
            RECIPE.format(net=net, transform=transform, optimizer=OPTIMIZERS[optimizer], steps=steps, save=save) + more
        )
        return path

    return lambda folder: partial(write_in, folder)


@pytest.fixture
def write_recipe(
    write_recipe_in: Callable[[Path], Callable[..., Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`write_recipe("rigl", "sgd", steps=12)`: a recipe file in the folder of the test."""
    monkeypatch.chdir(Path(__file__).resolve().parent.parent.parent)  # `tests.helpers.nets` is found from here
    return write_recipe_in(tmp_path)
