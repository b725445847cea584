"""The inputs of a Hugging Face model, by the signature of its forward pass and the numbers in its configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.errors import UsageError
from sparseift_cli.models.libraries import ForwardInputs
from sparseift_cli.models.request import Request


class Config(SimpleNamespace):
    """Sizes, and other configurations: those of towers."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class Text(nn.Module):
    main_input_name = "input_ids"

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> None: ...


class TextToText(nn.Module):
    main_input_name = "input_ids"

    def forward(self, input_ids: Tensor | None = None, decoder_input_ids: Tensor | None = None) -> None: ...


class TwoTowers(nn.Module):
    main_input_name = "input_ids"

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None) -> None: ...


class Image(nn.Module):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor) -> None: ...


class Sound(nn.Module):
    main_input_name = "input_values"

    def forward(self, input_values: Tensor | None) -> None: ...


class SoundToText(nn.Module):
    main_input_name = "input_features"

    def forward(self, input_features: Tensor | None = None, decoder_input_ids: Tensor | None = None) -> None: ...


class Series(nn.Module):
    main_input_name = "past_values"

    def forward(self, past_values: Tensor, past_observed_mask: Tensor, future_values: Tensor | None = None) -> None: ...


def shapes(model: nn.Module, config: Config, **request: Any) -> dict[str, tuple[int, ...]]:
    made = ForwardInputs(Request("hf:folder", **request), model, config, "meta").made()
    assert all((t.dtype == torch.int64) == name.endswith("ids") for name, t in made.items())
    return {name: tuple(t.shape) for name, t in made.items()}


VISION = Config(image_size=32, num_channels=1)


@pytest.mark.parametrize(
    ("model", "config", "want"),
    [
        (Text(), Config(max_position_embeddings=512), {"input_ids": (2, 128)}),
        (Text(), Config(max_position_embeddings=-1), {"input_ids": (2, 128)}),  # XLNet: without a limit
        (Text(), Config(text_config=Config(max_position_embeddings=77)), {"input_ids": (2, 77)}),
        (TextToText(), Config(is_encoder_decoder=True), {"input_ids": (2, 128), "decoder_input_ids": (2, 128)}),
        (
            TwoTowers(),
            Config(text_config=Config(max_position_embeddings=16), vision_config=VISION),
            {"input_ids": (2, 16), "pixel_values": (2, 1, 32, 32)},
        ),
        (Image(), Config(image_size=[32, 48]), {"pixel_values": (2, 3, 32, 48)}),
        (Image(), Config(image_size={"height": 8, "width": 9}), {"pixel_values": (2, 3, 8, 9)}),
        (Image(), Config(image_size=32, num_frames=4), {"pixel_values": (2, 4, 3, 32, 32)}),
        (Sound(), Config(), {"input_values": (2, 16000)}),
        (Sound(), Config(num_mel_bins=128, max_length=1024), {"input_values": (2, 1024, 128)}),
        (Sound(), Config(audio_channels=1, sampling_rate=24000), {"input_values": (2, 1, 24000)}),
        (
            SoundToText(),
            Config(is_encoder_decoder=True, num_mel_bins=80, max_source_positions=1500, max_target_positions=64),
            {"input_features": (2, 80, 3000), "decoder_input_ids": (2, 64)},
        ),
        (
            SoundToText(),
            Config(input_feat_per_channel=80, max_source_positions=6000),
            {"input_features": (2, 1000, 80)},
        ),
    ],
)
def test_inputs_follow_the_signature(model: nn.Module, config: Config, want: dict[str, tuple[int, ...]]) -> None:
    assert shapes(model, config, batch=2) == want


def test_a_shape_that_is_given_wins() -> None:
    assert shapes(Text(), Config(), seq=7) == {"input_ids": (1, 7)}
    assert shapes(Image(), Config(image_size=32), image=(3, 8, 8)) == {"pixel_values": (1, 3, 8, 8)}
    assert shapes(TwoTowers(), Config(), seq=7, image=(3, 8, 8)) == {"input_ids": (1, 7), "pixel_values": (1, 3, 8, 8)}
    assert shapes(Sound(), Config(), image=(400,)) == {"input_values": (1, 400)}


@pytest.mark.parametrize(
    ("model", "config", "request_", "message", "hint"),
    [
        (Series(), Config(), {}, "past_values and past_observed_mask, which Series reads", '"past_observed_mask": ...'),
        (TwoTowers(), Config(image_token_id=9), {}, "at the places of image tokens", "package.module:function"),
        (SoundToText(), Config(), {}, "input_features, which SoundToText reads", "package.module:function"),
        (nn.ModuleList(), Config(), {}, "ModuleList has no forward pass of its own", "architectures"),
        (Image(), Config(), {"seq": 3}, "--seq does not apply", "--input"),
    ],
)
def test_what_is_not_known_is_named(
    model: nn.Module, config: Config, request_: dict[str, int], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        shapes(model, config, **request_)
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("name", "macs"),
    [("r3d_18", 40_696_553_472), ("deeplabv3_mobilenet_v3_large", None), ("raft_small", None)],
)
def test_torchvision_beyond_classification(name: str, macs: int | None) -> None:
    """The input that the library's own FLOP counts were made at: 40.697 GFLOPs are published for R3D-18."""
    pytest.importorskip("torchvision")
    from sparseift_cli.models.source import load_table

    table = load_table(Request(f"torchvision:{name}"))
    assert table.macs > 0 and macs in (None, table.macs)
