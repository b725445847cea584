"""Names, aliases and refusals of the registry, none of which needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.errors import UsageError
from sparseift_cli.models import zoo
from sparseift_cli.models.zoo.catalog import ALIASES, MODELS, OF_NO_LIBRARY


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("resnet18", "resnet18"),
        ("ResNet-18", "resnet18"),
        ("resnet18-cifar", "resnet18_cifar"),
        ("resnet18_cifar100", "resnet18_cifar"),
        ("WRN-28-10", "wrn28_10"),
        ("mobilenetv2", "mobilenet_v2"),
        ("vit-b-16", "vit_b_16"),
        ("bert-base-uncased", "bert_base"),
        ("gpt3-small", "gpt3_small"),
        ("gpt3-2.7b", "gpt3_2_7b"),
        ("gpt3-175B", "gpt3_175b"),
        ("llama3-8b", "llama3_8b"),
    ],
)
def test_names_in_other_spellings(asked: str, name: str) -> None:
    assert zoo.lookup(asked).name == name


def test_no_two_names_collide() -> None:
    assert all(zoo.lookup(name).name == name for name in MODELS)
    assert set(ALIASES.values()) <= set(MODELS)
    assert not set(ALIASES) & set(MODELS)
    assert len(zoo.names()) == len(set(zoo.names())) == 39


def test_unknown_name_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(UsageError, match="no model is called 'resnet-19'") as caught:
        zoo.lookup("resnet-19")
    assert caught.value.hint is not None
    assert "did you mean 'resnet1" in caught.value.hint
    assert "llama3_8b" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        zoo.lookup("zzz")
    assert "did you mean" not in (caught.value.hint or "")
    with pytest.raises(UsageError) as caught:
        zoo.lookup("model.pth")
    assert caught.value.hint == "a checkpoint? sparseift inspect model.pth says what model it is of"


def test_every_model_says_what_it_is() -> None:
    for info in map(zoo.lookup, MODELS):
        assert (info.image is None) == (info.num_classes is None) == (info.seq is not None) == (info.kind == "tokens")
        assert info.title
        assert "keys of" in info.source or info.source in OF_NO_LIBRARY


def test_input_shapes() -> None:
    assert zoo.lookup("resnet18").input_shape() == (1, 3, 224, 224)
    assert zoo.lookup("resnet20").input_shape(batch=8) == (8, 3, 32, 32)
    assert zoo.lookup("gpt3_175b").input_shape() == (1, 2048)
    assert zoo.lookup("llama3_8b").with_input(seq=100_000).input_shape(2) == (2, 100_000)
    assert zoo.lookup("vit_b_16").with_input(image=(1, 32, 32)).input_shape() == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2", {"seq": 1025}, "learned positions for at most 1024 tokens"),
        ("bert_base", {"seq": 513}, "at most 512"),
        ("gpt2", {"num_classes": 10}, "--num-classes does not apply to gpt2"),
        ("gpt2", {"image": (3, 32, 32)}, "--input does not apply to gpt2"),
        ("resnet18", {"seq": 16}, "--seq does not apply to resnet18"),
        ("resnet18", {"num_classes": 0}, "at least 1"),
        ("resnet18", {"image": (3, 0, 224)}, "--input 3x0x224: every side"),
        ("gpt2", {"seq": -1}, "--seq -1"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        zoo.build(name, **options)


def test_batch_of_none_is_refused() -> None:
    with pytest.raises(UsageError, match="--batch 0"):
        zoo.lookup("gpt2").input_shape(batch=0)


def test_names_need_no_torch(root: Path) -> None:
    code = "import sys; from sparseift_cli.models import zoo; zoo.lookup('gpt2'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
