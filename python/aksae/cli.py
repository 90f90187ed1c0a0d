"""The command `aksae`: label, collect, train, eval, report, explain, steer, export, convert, adapt, study."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .collect import StoredDtype
from .config import (
    COMPARED,
    TITLES,
    EvaluationMetric,
    ExportTarget,
    LabelConfig,
    ModelChoice,
    ModelConfig,
    ProbeReads,
    TextChoice,
    TextConfig,
    TrainConfig,
    cache_folder,
    validate_inputs,
)
from .errors import Notice, UserError, missing_module
from .formats import Format, WrittenFormat
from .sites import Hook
from .study.plan import StudyConfig

try:
    import tyro
except ModuleNotFoundError as error:
    raise missing_module(error) from None

if TYPE_CHECKING:
    from .adaptation import Adaptation

_COLUMNS = {
    "fvu": "FVU",
    "explained_variance": "expl. var.",
    "mse": "MSE",
    "cosine": "cosine",
    "l2_ratio": "L2 ratio",
    "l0_mean": "L0 mean",
    "l0_min": "min",
    "l0_max": "max",
    "k_mean": "k mean",
    "dead": "dead",
}
_SPLICED = {
    "ce_damage": "CE damage",
    "kl": "KL",
    "recovered_mean": "recovered, mean abl.",
    "recovered_zero": "zero abl.",
}
_ADAPTED = {
    "own": "by its own rule",
    "same L0": "at a price, the same L0",
    "budget": "at a price, the budget",
    "half L0": "at a price, half the L0",
}
_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.EFBIG,
    errno.EEXIST,
    errno.ELOOP,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: the process's) and return the exit status.

    0 where all went well, 2 for bad input or a disk that refuses (one line on stderr), 130 for Ctrl-C. A notice is a
    line on stderr, too.
    """
    said, show = set(), warnings.showwarning

    def shown(message, category, *place, **others):
        if not issubclass(category, Notice):
            show(message, category, *place, **others)
        elif str(message) not in said:
            said.add(str(message))
            _say(f"note: {message}")

    with warnings.catch_warnings():
        # The filter "once" forgets what it saw whenever anybody changes a filter.
        warnings.filterwarnings("always", category=Notice)
        warnings.showwarning = shown
        return _status(arguments)


def _status(arguments: Sequence[str] | None) -> int:
    commands = {
        "label": label,
        "collect": collect,
        "train": train,
        "eval": evaluate,
        "report": report,
        "explain": explain,
        "steer": steer,
        "export": export,
        "convert": convert,
        "adapt": adapt,
        "study": study,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="aksae", description=__doc__, args=arguments)
    except UserError as error:
        return _failed(2, str(error))
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno)
        return _failed(2, f"{error.filename or 'output'}: {reason}; files written before stay valid")
    except ModuleNotFoundError as error:
        # One that is imported where it is used; SystemExit, since this is the command.
        raise missing_module(error) from None
    except KeyboardInterrupt:
        return _failed(130, "interrupted; the last checkpoint stays valid, as do shards of activations that were done")
    return 0


def label(
    out: Path,
    model: ModelConfig,
    text: TextConfig,
    labels: LabelConfig,
    overwrite: bool = False,
    cache: Path | None = None,
) -> None:
    """Score contexts for complexity, and write them with their scores.

    Args:
        out: a .parquet or .jsonl file to write: columns text, complexity_score, split.
        overwrite: write even where OUT is there.
        cache: folder for converted models and labels; None for AKSAE_CACHE or ~/.cache/aksae.
    """
    from .data import read_corpus, score_corpus
    from .files import atomic_file

    _check_label_file(out, overwrite)
    validate_inputs(model, text, labels)
    cache = cache_folder(cache)
    corpus = read_corpus(model, text, labels, cache)
    scores = score_corpus(corpus, labels, cache)
    rows = [
        {"text": context, "complexity_score": score, "split": split}
        for split, contexts, side in (
            ("train", corpus.train, scores.train),
            ("heldout", corpus.heldout, scores.heldout),
        )
        for context, score in zip(contexts.texts, side.tolist(), strict=True)
        if not math.isnan(score)
    ]
    # Hours may have passed since it was first looked at.
    _check_label_file(out, overwrite)
    with atomic_file(out) as temporary:
        if out.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
        else:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} contexts with a score in {out}; {scores.failed} could not be scored and were left out")


def collect(
    out: Path,
    model: ModelConfig,
    text: TextConfig,
    layers: tuple[int, ...] = (),
    sites: tuple[Hook, ...] = ("resid_post",),
    dtype: StoredDtype = "float32",
    shard_mb: float = 64,
    cache: Path | None = None,
) -> None:
    """Collect a language model's activations on text, for training on them later.

    Says first what disk and time it will take. Cut off at any moment, the same command goes on.

    Args:
        out: folder to write; in it a folder for each layer and site, such as layers.15.resid_post.
        layers: blocks to read, in one pass of the model; none for model.layer alone.
        sites: places to read in each of them: the residual stream after (resid_post) or before the block (resid_pre),
            what its MLP (mlp_out) or its attention (attn_out) adds to it.
        dtype: precision in which activations are stored.
        shard_mb: size of a file; what was done of one is lost where collecting is cut off.
        cache: folder for converted models; None for AKSAE_CACHE or ~/.cache/aksae.
    """
    from .collect import collect
    from .data import read_corpus
    from .sites import Site

    validate_inputs(model, text, LabelConfig())
    if out.exists() and not out.is_dir():
        raise UserError(f"out: got {out}, a file, needs a folder")
    if not sites:
        raise UserError("sites: got none, needs at least one")
    # The model stops at the last layer that is read, and is asked for it before its weights are loaded.
    read = dict.fromkeys(Site(layer, hook) for layer in layers or (model.layer,) for hook in sites)
    deepest = dataclasses.replace(model, layer=max(site.layer for site in read))
    corpus = read_corpus(deepest, text, None, cache_folder(cache))
    collected = collect(
        corpus.model,
        corpus.train.followed_by(corpus.heldout),
        {site: out / str(site) for site in read},
        batch_size=model.batch_size,
        dtype=dtype,
        shard_mb=shard_mb,
        heldout=len(corpus.heldout),
        verify=True,
        announce=functools.partial(print, flush=True),
    )
    for activations in collected.values():
        print(f"{len(activations):,} rows of width {activations.d_in} in {activations.path}")


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")], resume: Path | None = None) -> None:
    """Train an SAE on text or on activations that are there, and write checkpoints, metrics and an evaluation.

    By default a row keeps the latents that lower its error by more than a price (--selection priced), and a TopK SAE of
    the same mean L0 is trained beside it. AdaptiveK as published is --selection adaptivek. Both get a report.

    Args:
        resume: folder of a run that was cut off: it goes on from its last checkpoint with its own settings, and those
            given here are not looked at.
    """
    from .runs import read_run
    from .train import train

    config = config if resume is None else read_run(resume)
    result = train(config, resume=resume is not None)
    _print_table(result.evaluation)
    reported = config.selection in COMPARED
    print(f"report: {result.folder / 'report.html'}" if reported else f"SAE: {result.folder / config.selection}")


def evaluate(
    run: tyro.conf.Positional[Path],
    model: ModelChoice,
    text: TextChoice,
    metrics: tuple[EvaluationMetric, ...] = (),
    site: Hook | None = None,
    recalibrate: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Evaluate the checkpoints of a run again, on its held-out documents, or elsewhere.

    Without options the run's eval.json is written again, on the same data or not at all. With any, all SAEs of the run
    are evaluated on the text, layer or model asked for, into a file of its own. Its documents are all evaluated on:
    take others than were trained on. With the run's own text settings they are those that it held out.

    Args:
        run: folder of a run, or of an SAE (in a run, such as its baseline, or by itself, with --model.name,
            --model.layer and --text.source).
        metrics: reconstruction (none for that alone); ce for the model's cross-entropy and KL divergence with the
            reconstruction in place of the activations.
        site: place in the block that is read; None for the one that the run says, else resid_post.
        recalibrate: set prices and biases by the first half of the documents, so that the mean L0 is the budget, and
            evaluate on the second half.
        out: a .json file to write; None for eval-MODEL-SITE-TEXT-DIGEST.json in RUN.
        overwrite: write even where OUT is there.
    """
    from .elsewhere import evaluate_elsewhere
    from .evaluate import evaluate_run
    from .files import WEIGHTS

    chosen = (model, text, metrics, site, recalibrate, out, overwrite)
    if chosen == (ModelChoice(), TextChoice(), (), None, False, None, False) and not (run / WEIGHTS).is_file():
        _print_table(evaluate_run(run))
        return
    done = evaluate_elsewhere(
        run,
        model=model,
        text=text,
        hook=site,
        metrics=metrics or ("reconstruction",),
        recalibrate=recalibrate,
        out=out,
        overwrite=overwrite,
    )
    _print_elsewhere(done.evaluation)
    print(f"evaluation: {done.file}")


def report(run: tyro.conf.Positional[Path]) -> None:
    """Draw the report of a finished run: one self-contained HTML file.

    Args:
        run: folder of the run.
    """
    from .report import write_report

    print(f"report: {write_report(run)}")


def explain(
    run: tyro.conf.Positional[Path],
    latents: tyro.conf.Positional[tuple[int, ...]],
    model: ModelChoice,
    examples: int = 5,
    tokens: int = 10,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Say of latents where they fire on a run's held-out text, how strongly, and which tokens they make likelier.

    Args:
        run: folder of a run, or of an SAE in a run, such as its baseline.
        latents: their numbers.
        examples: contexts shown of each, those in which it is strongest; tokens on which it fires are in «».
        tokens: how many of the tokens are shown that its decoder row alone makes likelier, and less likely.
        json_file: a file to write all of it to, with whole contexts and the activation at every token.
    """
    from .explain import described, explain
    from .files import write_json

    explained = explain(run, latents, examples=examples, tokens=tokens, model=model)
    if json_file is not None:
        write_json(json_file, explained)
    _print(described(explained))


def steer(
    run: tyro.conf.Positional[Path],
    prompt: tyro.conf.Positional[str],
    latent: int,
    strength: float,
    model: ModelChoice,
    site: Hook | None = None,
    tokens: int = 40,
    seed: int = 0,
) -> None:
    """Continue a prompt with and without a latent of an SAE set to a strength.

    Args:
        run: folder of a run, or of an SAE (in a run, such as its baseline, or by itself, with --model.name and
            --model.layer).
        prompt: text to go on with.
        latent: number of the latent.
        strength: activation that it is given at every token, in the unit of `aksae explain`, which prints its largest:
            once to a few times that one steers, 0 ablates.
        site: place in the block that the SAE reads; None for the one that its run says, else resid_post.
        tokens: how many tokens are drawn at most.
        seed: of both drawings.
    """
    from .steer import steer

    done = steer(run, prompt, latent, strength, tokens=tokens, seed=seed, model=model, site=site)
    _print(f"{done.where}\n\nwithout: {prompt}{done.without}\n\nwith:    {prompt}{done.steered}")


def export(
    run: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[Path],
    to: ExportTarget,
    model: ModelChoice,
    site: Hook | None = None,
    overwrite: bool = False,
) -> None:
    """Write the SAE of a run as a folder for the Hugging Face hub, SAEDashboard or Neuronpedia.

    Args:
        run: folder of a run, or of an SAE (in a run, such as its baseline, or by itself, with --model.name and
            --model.layer).
        folder: where to write; a README.md in it says how to go on.
        to: hub takes this project's files, SAELens' and a model card; saedashboard and neuronpedia SAELens' files with
            the names of model (--model.name, where the run's is a folder) and hook.
        site: place in the block that the SAE reads; None for the one that its run says, else resid_post.
        overwrite: write even where FOLDER holds files.
    """
    from .export import export

    notes = export(run, folder, to, model=model, site=site, overwrite=overwrite)
    print(f"{run} -> {folder} ({to}); {'; '.join(notes) or 'weights unchanged'}")


def convert(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")],
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")],
    to: WrittenFormat,
    source_format: Annotated[Format | None, tyro.conf.arg(name="from")] = None,
    overwrite: bool = False,
    steepness: float | None = None,
    score_min: float | None = None,
    score_max: float | None = None,
    probe_reads: ProbeReads | None = None,
    dict_class: str | None = None,
    k: int | None = None,
    transcoder: bool | None = None,
) -> None:
    """Convert the files of an SAE to another project's format, or refuse with the reason.

    Args:
        source: what the other project would be given: a folder, the file of a format of one file, or on the Hugging
            Face hub owner/name[@revision][/folder or file].
        target: the folder or file to write.
        to: format to write.
        source_format: format of SRC; None where the names of its files or tensors tell.
        overwrite: write even where DST is there.
        steepness: slope of the score-to-k map, which adaptivek files do not hold; None for 6.
        score_min: lowest score of that map; None for 0.
        score_max: highest score of that map; None for 10.
        probe_reads: what the probe of adaptivek files was fitted to read; None for last.
        dict_class: class of a dictionary_learning ae.pt without its config.json; None where the tensors tell.
        k: latents of a vector that such a file keeps, where it is TopK; None where the tensors tell.
        transcoder: whether gemma_scope files are a transcoder's; None where names tell, else False.
    """
    from .formats import convert

    try:
        done = convert(
            source,
            target,
            to=to,
            source_format=source_format,
            overwrite=overwrite,
            steepness=steepness,
            score_min=score_min,
            score_max=score_max,
            probe_reads=probe_reads,
            dict_class=dict_class,
            k=k,
            transcoder=transcoder,
        )
    except FileNotFoundError as error:
        # The target's: a source that is not there is a UserError.
        raise UserError(f"{target}: got {os.strerror(error.errno)}, needs a place that can be written") from error
    print(done)


def adapt(
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")],
    model: ModelConfig,
    text: TextConfig,
    budget: int | None = None,
    out: Path | None = None,
    site: Hook = "resid_post",
    source_format: Annotated[Format | None, tyro.conf.arg(name="from")] = None,
    cache: Path | None = None,
    overwrite: bool = False,
    steepness: float | None = None,
    score_min: float | None = None,
    score_max: float | None = None,
    dict_class: str | None = None,
    k: int | None = None,
) -> None:
    """Give an SAE that is there latents at a price, and say what that gains at equal L0.

    Nothing is trained. The price is set on the train side of the text; everything is measured on the held-out one.

    Args:
        file: an SAE of any project that `aksae convert` reads: a folder, a file, or on the Hugging Face hub
            owner/name[@revision][/folder or file].
        budget: mean number of latents of a token; None for as many as the SAE keeps by its own rule.
        out: folder for the SAE at the budget, as SAE.from_pretrained reads it; None writes none.
        site: place in block model.layer that the SAE is for: the residual stream after (resid_post) or before the block
            (resid_pre), what its MLP (mlp_out) or its attention (attn_out) adds to it.
        source_format: format of FILE; None where the names of its files or tensors tell.
        cache: folder for converted models and activations; None for AKSAE_CACHE or ~/.cache/aksae.
        overwrite: replace an SAE in OUT.
        steepness: slope of the score-to-k map, which adaptivek files do not hold; None for 6.
        score_min: lowest score of that map; None for 0.
        score_max: highest score of that map; None for 10.
        dict_class: class of a dictionary_learning ae.pt without its config.json; None where the tensors tell.
        k: latents of a vector that such a file keeps, where it is TopK; None where the tensors tell.
    """
    from .adaptation import adapt_file

    adapted = adapt_file(
        file,
        model,
        text,
        budget=budget,
        out=out,
        hook=site,
        format=source_format,
        cache=cache,
        overwrite=overwrite,
        steepness=steepness,
        score_min=score_min,
        score_max=score_max,
        dict_class=dict_class,
        k=k,
    )
    _print_adaptation(adapted)
    if out is not None:
        print(f"SAE: {out}")


def study(config: Annotated[StudyConfig, tyro.conf.arg(name="")]) -> None:
    """Compare selections at equal L0: same tokens, updates and search for a learning rate, intervals, controls.

    Whatever was done is kept: cut off at any moment, or with more seeds, budgets or selections, the same command goes
    on. It prints a table; results.json, pareto.png and controls.png in the folder have all of it.
    """
    from .study import study
    from .study.figures import write_figures
    from .study.summary import lines, synthetic_lines

    found = study(config, functools.partial(print, flush=True))
    print("\nDifferences are relative; those in brackets have an interval that holds 0.")
    _print_lines(lines(found, TITLES))
    if table := synthetic_lines(found, TITLES):
        _print_lines(table)
    for path in write_figures(found, TITLES, config.output):
        print(path)


def _check_label_file(out: Path, overwrite: bool) -> None:
    """Raise UserError where `out` cannot be written, or must not be."""
    if out.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"out: got {out}, needs a name that ends in .parquet or .jsonl")
    if not out.parent.is_dir():
        raise UserError(f"out: got {out}, needs a folder that exists")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"out: got {out}, needs a folder that can be written")
    if out.exists() and not (overwrite and out.is_file()):
        raise UserError(f"out: got {out}, which exists, needs a new file (or overwrite)")


def _print_table(evaluation: dict[str, Any]) -> None:
    """The models' metrics, one a line, under their names."""
    lines = [["", *_COLUMNS.values()]]
    for name, metrics in evaluation["models"].items():
        lines.append([TITLES[name], *(_cell(key, metrics[key]) for key in _COLUMNS)])
    print(f"\n{evaluation['rows']:,} held-out tokens")
    _print_lines(lines)


def _print_elsewhere(evaluation: dict[str, Any]) -> None:
    """What was evaluated on, and the SAEs' metrics, one a line."""
    held_out = " that the run held out" if evaluation["held_out"] else ""
    where = f"{evaluation['text']['source']}, {evaluation['model']['name']}, {evaluation['site']}"
    print(f"\n{evaluation['rows']:,} tokens of {evaluation['documents']:,} documents{held_out}: {where}")
    if evaluation["recalibrated"]:
        print(f"{evaluation['calibrated']:,} tokens of other documents set prices and biases")
    if losses := evaluation.get("cross_entropy"):
        print(_cross_entropies(**losses))
    columns = {**_COLUMNS, **_SPLICED}
    shown = [key for key in columns if all(key in metrics for metrics in evaluation["models"].values())]
    lines = [["", *(columns[key] for key in shown)]]
    for name, metrics in evaluation["models"].items():
        lines.append([TITLES.get(name, name), *(_cell(key, metrics[key]) for key in shown)])
    _print_lines(lines)


def _cross_entropies(clean: float, mean_ablated: float, zero_ablated: float) -> str:
    return (
        f"cross-entropy {clean:.4f}, {mean_ablated:.4f} with the mean in place of the activations, {zero_ablated:.4f} "
        "with zeros"
    )


def _print_adaptation(result: Adaptation) -> None:
    """What the SAE was and what it is at a price, one a line."""
    losses = result.cross_entropy
    lines = [["", "L0", "FVU", *_SPLICED]]
    for name, metrics in result.metrics.items():
        summary = losses.summary(name)
        spliced = [_cell(key, summary[key]) for key in _SPLICED]
        lines.append([_ADAPTED[name], f"{metrics['l0_mean']:.1f}", f"{metrics['fvu']:.4f}", *spliced])
    print(f"\n{result.described}")
    for note in result.notes:
        print(f"  {note}")
    print(f"{result.calibrated:,} tokens set the prices, {result.heldout:,} held-out tokens judge")
    print(_cross_entropies(**losses.means()))
    _print_lines(lines)


def _print_lines(lines: list[list[str]]) -> None:
    """Cells in columns, the first of which stands left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print()


def _cell(key: str, value: float) -> str:
    if key in ("l0_min", "l0_max"):
        return f"{value:.0f}"
    if key in ("l0_mean", "k_mean"):
        return f"{value:.1f}"
    if key in ("ce_damage", "kl"):
        return f"{value:.4f}"
    return f"{value:.1%}" if key in ("dead", "recovered_mean", "recovered_zero") else f"{value:.4g}"


def _print(text: str) -> None:
    """Print what a model said, also where the terminal has not all of its characters."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


def _failed(status: int, message: str) -> int:
    _say(message)
    return status


def _say(message: str) -> None:
    print("aksae: " + " ".join(message.split()), file=sys.stderr)
