"""The sections that say how it is trained: optimizer, schedule, training, evaluation, checkpoint."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .section import Count, Duration, NotNegative, Positive, Section

NoDecay = tuple[Literal["norm", "bias"], ...]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Metric = Literal["loss", "top1", "top5", "perplexity", "bits_per_byte"]

_NO_DECAY = "Parameters without weight decay: norm, bias."
_WEIGHT_DECAY = "Weight decay."
_LR = "Learning rate at its peak."
_FUSED = "One kernel for the whole update, where the device has it."


class SGD(Section):
    """Stochastic gradient descent."""

    SHORT: ClassVar[str | None] = "name"
    name: Literal["sgd"] = Field("sgd", description="The optimiser.")
    lr: Positive = Field(0.1, description=_LR)
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum.")
    nesterov: bool = Field(False, description="Nesterov's form of momentum.")
    weight_decay: NotNegative = Field(0.0, description=_WEIGHT_DECAY)
    no_decay_on: NoDecay = Field((), description=_NO_DECAY)
    fused: bool = Field(True, description=_FUSED)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(Section):
    """Adam with decoupled weight decay."""

    SHORT: ClassVar[str | None] = "name"
    name: Literal["adamw"] = Field("adamw", description="The optimiser.")
    lr: Positive = Field(1e-3, description=_LR)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay of the means of gradients and of their squares."
    )
    eps: Positive = Field(1e-8, description="Added to the root of the mean square.")
    weight_decay: NotNegative = Field(0.01, description=_WEIGHT_DECAY)
    no_decay_on: NoDecay = Field((), description=_NO_DECAY)
    fused: bool = Field(True, description=_FUSED)


class _Schedule(Section):
    SHORT: ClassVar[str | None] = "name"
    warmup: Duration = Field(0.0, description="The learning rate rises linearly from 0 over this time.")


class Constant(_Schedule):
    """The peak, from the end of the warm-up on."""

    name: Literal["constant"] = Field("constant", description="The schedule of the learning rate.")


class MultiStep(_Schedule):
    """The peak times gamma at each milestone."""

    name: Literal["multistep"] = Field("multistep", description="The schedule of the learning rate.")
    milestones: tuple[Duration, ...] = Field(("30%", "60%", "80%"), description="When the learning rate drops.")
    gamma: Positive = Field(0.1, description="What each milestone multiplies it by.")


class Cosine(_Schedule):
    """Half a cosine from the peak to `final_lr`, from the end of the warm-up to the end of the run."""

    name: Literal["cosine"] = Field("cosine", description="The schedule of the learning rate.")
    final_lr: NotNegative = Field(0.0, description="Learning rate at the end.")


class Linear(_Schedule):
    """A straight line from the peak to `final_lr`, from the end of the warm-up to the end of the run."""

    name: Literal["linear"] = Field("linear", description="The schedule of the learning rate.")
    final_lr: NotNegative = Field(0.0, description="Learning rate at the end.")


class Training(Section):
    """The run itself."""

    epochs: Positive | None = Field(None, description="Length of the run in passes over the training data.")
    steps: Count | None = Field(None, description="Length of the run in optimiser steps, instead of epochs.")
    batch_size: Count = Field(
        128, description="Samples of a step, over all micro-batches and processes; epochs leave out a smaller last one."
    )
    accumulate: Count = Field(1, description="Micro-batches that a process adds up to a step.")
    clip: Positive | None = Field(None, description="Largest norm of the gradient; larger ones are scaled to it.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Label smoothing.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Autocast forward and backward to this type."
    )
    channels_last: bool = Field(False, description="Images in channels-last memory.")
    compile: bool | Literal["auto"] = Field(
        False, description="torch.compile the model and the augmentation; auto: on a GPU only."
    )
    cuda_graph: bool = Field(
        True, description="On a GPU, replay the whole step as a CUDA graph, where that can be (not fp16, one process)."
    )
    recompute: bool = Field(
        False,
        description="Activation checkpointing: less memory, a second forward of every repeated block a step; no CUDA graph.",
    )
    deterministic: bool = Field(
        False, description="Deterministic kernels: on a GPU, resuming is exact to the bit only with these; slower."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    threads: Count | None = Field(None, description="CPU threads; bits depend on it. Default: PyTorch's choice.")
    seed: Seed = Field(0, description="Of weights, masks, data order and augmentation.")
    seeds: tuple[Seed, ...] = Field(
        (), description="One run for each of these, instead of `seed`. --seeds 0..4 sets it."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("the length of the run is epochs or steps: give one of them")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} micro-batches")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds has a seed twice")
        return self

    @property
    def unit(self) -> Literal["epochs", "steps"]:
        """What a plain number as a duration counts."""
        return "steps" if self.epochs is None else "epochs"


class Evaluation(Section):
    """What is measured on held-out data, and when."""

    every: Duration = Field("1 epoch", description="Time between two evaluations; the end of the run has one always.")
    metrics: tuple[Metric, ...] = Field(("loss",), description="What is measured.")
    limit: Count | None = Field(
        None, description="Use the first N held-out samples only (images, or windows of model.seq tokens)."
    )
    batch_size: Count | None = Field(None, description="Samples of a batch. Default: that of the training.")
    test: bool = Field(False, description="Measure the test split too, once, at the end: where another one is watched.")


class Checkpoint(Section):
    """What a run leaves on disk to resume from."""

    every: Duration = Field("5%", description="Time between two checkpoints; the end of the run has one always.")
    keep: Count = Field(2, description="The newest N are kept, beside the best.")
    best: Metric | None = Field(None, description="The metric that says which one is best (loss, perplexity: lowest).")
