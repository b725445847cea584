"""The models of a survey: torchvision's classifiers, Hugging Face families built small from a config, and the zoo.

Needs the libraries themselves, in an environment of their own: none of it runs in the test suite.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparseift_cli.models.libraries import maker, optional
from sparseift_cli.models.request import Request
from sparseift_cli.models.zoo import registry

from .foreign import listed
from .subject import Subject

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FEW = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {"num_key_value_heads": 2}
HEADS = {"head_dim": 16}
IMAGE = {"image_size": 32, "num_labels": 10}
SEQ2SEQ = {
    "d_model": 48,
    **{
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
    },
}

# class, config, options: the attention of each is as in the published models (GQA, MQA, fused QKV, partial rotary, ...)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", TEXT | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        TEXT
        | {
            "hidden_size": 48,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT | SMALL),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT | SMALL | GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", TEXT | SMALL | GQA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT | SMALL | GQA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", TEXT | SMALL | {"num_key_value_heads": 1, "head_dim": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT | SMALL),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT | SMALL),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT | SMALL),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        TEXT | {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", TEXT | SEQ2SEQ),
    "falcon": ("FalconForCausalLM", "FalconConfig", TEXT | FEW),
    "falcon_grouped": (
        "FalconForCausalLM",
        "FalconConfig",
        TEXT | FEW | {"num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        TEXT | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        TEXT | {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", TEXT | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", "MptConfig", TEXT | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT | SMALL | GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT | SMALL | GQA | HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", TEXT | SMALL | GQA | HEADS),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", TEXT | SMALL | GQA),
    "granite": ("GraniteForCausalLM", "GraniteConfig", TEXT | SMALL | GQA),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", TEXT | SMALL | GQA),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", TEXT | SMALL | GQA),
    "cohere": ("CohereForCausalLM", "CohereConfig", TEXT | SMALL | GQA),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", TEXT | SMALL | GQA | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        TEXT | SMALL | GQA | HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", TEXT | {"hidden_size": 64, "num_hidden_layers": 2}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 101, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", TEXT | SMALL | {"embedding_size": 64}),
    "deberta_v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", TEXT | SMALL),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", TEXT | SMALL | {"embedding_size": 32}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", TEXT | SMALL | {"cls_token_id": 1, "sep_token_id": 2}),
} | (
    IMAGES := {
        "vit": ("ViTForImageClassification", "ViTConfig", SMALL | IMAGE | {"patch_size": 8}),
        "deit": ("DeiTForImageClassification", "DeiTConfig", SMALL | IMAGE | {"patch_size": 8}),
        "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", SMALL | IMAGE | {"patch_size": 8}),
        "swin": (
            "SwinForImageClassification",
            "SwinConfig",
            IMAGE | {"patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        ),
        "convnextv2": (
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            IMAGE | {"patch_size": 2, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
        ),
        "resnet": (
            "ResNetForImageClassification",
            "ResNetConfig",
            {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_labels": 10},
        ),
    }
)
LLAMA_1B = TEXT | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def torchvision() -> Iterator[Subject]:
    """Every model of `list_models(module=torchvision.models)`."""
    make = maker("torchvision:")
    assert make is not None
    make(Request("torchvision:resnet18"), "meta")  # declares the ops that a torchvision without compiled code lacks
    models = importlib.import_module("torchvision.models")

    for name in models.list_models(module=models):
        request = Request(f"torchvision:{name}")
        yield Subject(name, lambda d, r=request: make(r, d).model, lambda d, r=request: make(r, d).args)


def transformers() -> Iterator[Subject]:
    """Families built small."""
    for name in TRANSFORMERS:
        yield Subject(name, lambda d, n=name: hugging_face(n, d), kwargs=lambda d, n=name: hugging_face_input(n, d))


def hugging_face(name: str, device: str) -> nn.Module:
    """One family, small, with fresh weights."""
    library = optional("transformers", name)

    cls, config, options = TRANSFORMERS[name]
    with torch.device(device):
        return getattr(library, cls)(getattr(library, config)(**options)).eval()


def hugging_face_input(name: str, device: str) -> dict[str, Tensor]:
    """Keyword arguments of one forward: random tokens or pixels."""
    if name in IMAGES:
        return {"pixel_values": torch.randn(2, 3, 32, 32, device=device)}
    ids = torch.zeros(2, 16, dtype=torch.int64, device=device)
    if device != "meta":
        ids = torch.randint(3, 101, (2, 16))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name in ("t5", "bart") else {})


def zoo() -> Iterator[Subject]:
    """Every model of the zoo at its default input."""
    for name in registry.names():
        info = registry.lookup(name)
        yield Subject(name, lambda d, n=name: _zoo(n, d), lambda d, i=info: (registry.example_input(i, device=d),))


def _zoo(name: str, device: str) -> nn.Module:
    from sparseift_cli.trace.fake_mode import no_init

    with torch.device(device), no_init(device):
        return registry.build(name).eval()


def large() -> Iterator[Subject]:
    """A real size: the shape of Llama 3.2 1B, on meta."""

    def build(device: str) -> nn.Module:
        library = optional("transformers", "llama_1b")
        with torch.device(device):
            return library.LlamaForCausalLM(library.LlamaConfig(**LLAMA_1B)).eval()

    ids = {"input_ids": torch.zeros(1, 2048, dtype=torch.int64, device="meta")}
    yield Subject("llama_1b", build, kwargs=lambda device: ids)


SETS: dict[str, Callable[[], Iterator[Subject]]] = {
    "torchvision": torchvision,
    "transformers": transformers,
    "zoo": zoo,
    "large": large,
    "timm": partial(listed, "timm"),
    "transformers_more": partial(listed, "transformers_more"),
    "others": partial(listed, "others"),
}
