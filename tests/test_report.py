"""The HTML report: what it says about a run, that it stands alone, and that nothing in a run can break the page."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from aksae.config import TrainConfig, to_dict
from aksae.errors import UserError
from aksae.report import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "&amp;",
    "\x00",
    "\n",
    "\ud800",
    "\u202e",
    "{{ 7 * 7 }}",
]
PROSE = (
    " The interpreter evaluates default parameter values from left to right when the function definition is executed ."
    " This means that the expression is evaluated once , and that the same precomputed value is used for each call ."
    " A class definition is an executable statement , and the inheritance list usually gives a list of base classes ."
)


def metrics_of(model, steps, phase3, rng):
    for step in range(0, steps, 10):
        decay = math.exp(-step / (steps / 6))
        fvu = 0.11 + 0.9 * decay * (1 + 0.03 * rng.standard_normal()) + (0.012 if model == "topk" else 0)
        third = model == "adaptivek" and step >= phase3
        yield {
            "model": model,
            "phase": 3 if third else 2,
            "step": step,
            "rows": (step + 1) * 2048,
            "lr": 1e-3,
            "loss": fvu * 4.1 + 0.02 + (2.1 if third else 0),
            "mse": fvu * 4.1,
            "fvu": fvu,
            "sparsity": 3.2 + decay,
            "aux": 0.0 if step < 60 else 0.93 + 0.01 * rng.standard_normal(),
            "probe": 2.3 + 0.05 * rng.standard_normal() if third else None,
            "deviation": 0.01 if third else None,
            "delta": 0.2 if third else None,
            "l0": 171 + 4 * rng.standard_normal(),
            "k_mean": 172.0,
            "dead": 0.34 * max(0.0, 1 - math.exp(-(step - 50) / 150)) if step > 50 else 0.0,
            "tokens_per_s": 8123.4,
        }


def top_contexts(rng, latents=4, examples=3):
    tokens = PROSE.replace(" ", "\0 ").split("\0")[1:]
    for latent in range(latents):
        peak = 9.0 / (latent + 1)
        chosen = []
        for _ in range(examples):
            activations = np.maximum(0, rng.standard_normal(len(tokens)) - 1.2) * peak / 4
            activations[rng.integers(len(tokens))] = peak
            chosen.append({"tokens": tokens, "activations": activations.tolist(), "score": 6.2, "k": 221})
        yield {"latent": 100 * latent + 7, "max": peak, "examples": chosen}


def run_contents(steps=600, contexts=180):
    """What a finished training run leaves in its folder, made up but in the proportions of a real one."""
    rng = np.random.default_rng(0)
    phase3 = int(0.9 * steps)
    scores = np.clip(rng.normal(5.2, 1.9, contexts), 0, 10)
    predicted = np.clip(scores + rng.normal(0, 1.1, contexts), 0, 10)
    ks = np.round(20 + 300 / (1 + np.exp(-6 * (predicted / 10 - 0.5)))).astype(int)
    distinct, counts = np.unique(ks, return_counts=True)
    factors = (0.25, 0.5, 0.75, 1, 1.5, 2)
    adaptive = {
        "fvu": 0.1178, "explained_variance": 0.8824, "mse": 0.4831, "cosine": 0.9412, "l2_ratio": 0.9433,
        "l0_mean": 171.4, "l0_min": 36, "l0_max": 302, "k_mean": 171.9, "dead": 0.3412,
    }  # fmt: skip
    topk = {
        "fvu": 0.1291, "explained_variance": 0.8711, "mse": 0.5294, "cosine": 0.9358, "l2_ratio": 0.9391,
        "l0_mean": 171.0, "l0_min": 171, "l0_max": 171, "k_mean": 171.0, "dead": 0.2966,
    }  # fmt: skip
    lambdas = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0]
    return {
        "config": to_dict(TrainConfig(steps=steps, selection="adaptivek")),
        "metrics": [*metrics_of("adaptivek", steps, phase3, rng), *metrics_of("topk", steps, phase3, rng)],
        "probe": {
            "lambda": 100.0,
            "cv": {"lambdas": lambdas, "rmse": [1.92, 1.90, 1.81, 1.58, 1.31, 1.19, 1.34]},
            "heldout": {"rmse": 1.213, "pearson": 0.781, "spearman": 0.766, "n": 148},
            "scores": {"scored": 913, "failed": 2},
        },
        "eval": {
            "rows": 9812,
            "models": {"adaptivek": adaptive, "topk": topk},
            "l0_fvu": {
                "adaptivek": [[171.4 * f, 0.1178 * f**-0.45] for f in factors],
                "topk": [[171.0 * f, 0.1291 * f**-0.45] for f in factors],
            },
            "contexts": [
                {"score": float(s), "predicted": float(p), "k": int(k)} for s, p, k in zip(scores, predicted, ks)
            ],
            "k_histogram": {"k": distinct.tolist(), "rows": (54 * counts).tolist()},
            "top_contexts": list(top_contexts(rng)),
        },
    }


def without_plots():
    """A run whose report has nothing to draw, for the tests that are not about drawings."""
    contents = run_contents(steps=1, contexts=1)
    contents["metrics"] = []
    contents["probe"]["cv"] = {}
    contents["eval"] |= {"l0_fvu": {}, "contexts": [], "k_histogram": {}}
    return contents


def write_run(folder, contents):
    for name in ("config", "probe", "eval"):
        if name in contents:
            (folder / f"{name}.json").write_text(json.dumps(contents[name]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in contents["metrics"]))
    return folder


class Page(HTMLParser):
    """Checks nesting and unique ids while reading, and keeps what the tests ask about."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.tags, self.references, self.text, self.titles = [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id occurs twice"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)
            if name == "title":
                self.titles.append(value)
            assert not name.startswith("on"), f"event handler {name} on <{tag}>"

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def report_of(folder, contents):
    path = write_report(write_run(folder, contents))
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return report_of(tmp_path_factory.mktemp("run"), run_contents())


def test_it_stands_alone(full):
    html, page = full
    assert page.references, "the page links to its own sections"
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in page.references)
    assert not {"script", "link", "img", "iframe", "image", "object"} & set(page.tags)
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]*)\)", html))
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.lstrip().startswith("<!DOCTYPE html>")


def test_it_states_the_run_and_compares_the_models(full):
    html, page = full
    for fact in (
        "smollm2",
        "after block 15",
        "python-prose",
        "100,000",
        "9,812",
        "4,096 latents",
        "913 contexts scored, 2 failed",
    ):
        assert fact in page.words, fact
    assert "leaves 11.78% of the held-out variance unexplained, 8.8% less than TopK (12.91%)." in page.words
    assert "not quite a comparison" not in page.words
    better = re.findall(r'<th scope="row">([^<]*)<small>.*?</th>\s*<td class="best"><strong>([^<]*)', html)
    assert [name for name, _ in better] == ["FVU", "Explained variance", "MSE", "Cosine similarity", "L2 ratio"]
    assert [value for _, value in better] == ["0.1178", "0.8824", "0.4831", "0.9412", "0.9433"]
    assert re.search(r'<td>34\.12%</td>\s*<td class="best"><strong>29\.66%', html), "fewer dead latents is better"


def test_every_plot_is_drawn_and_described(full):
    html, page = full
    titles = [
        "L0 and FVU", "Distribution of k", "Label and k",
        "Total loss", "FVU of the batch", "Sparsity term", "Auxiliary term", "L0", "Dead latents",
        "Cross-validation", "Label and prediction", "Probe term",
    ]  # fmt: skip
    assert re.findall(r"<figure>\s*<h3>([^<]*)</h3>\s*<svg", html) == titles
    assert page.tags.count("figcaption") == len(titles)
    assert html.count('role="img" aria-label="') == len(titles) + 1
    assert "phase 3" in page.words
    assert "#0a0b0" not in html, "a drawing colour was not turned into a CSS variable"
    assert "<metadata" not in html


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path, run_contents(steps=50, contexts=5))
    first = write_report(run).read_bytes()
    assert write_report(str(run)).read_bytes() == first
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "probe.json",
        "eval.json",
        "report.html",
    }


def test_tokens_cannot_become_markup(tmp_path):
    contents = without_plots()
    contents["eval"]["top_contexts"] = [
        {
            "latent": 3,
            "max": 2.0,
            "examples": [{"tokens": HOSTILE, "activations": [2.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0]}],
        }
    ]
    contents["config"]["model"]["name"] = "</title><script>x</script>"
    contents["config"]["text"]["source"] = '"><script>'
    html, page = report_of(tmp_path, contents)
    assert not {"script", "img"} & set(page.tags)
    assert all(text in page.words for text in (HOSTILE[0], HOSTILE[1], "&amp;", "{{ 7 * 7 }}", "␀", "↵"))
    assert "\x00" not in html
    assert page.titles == ["2", "1", "0.5", "0.5", "0.5", "0.5", "1"]


def test_shading_follows_the_activation_and_the_text_is_cut_around_the_peak(tmp_path):
    contents = without_plots()
    tokens = [f" w{i}" for i in range(200)]
    activations = [0.0] * 200
    activations[100], activations[105], activations[199] = 4.0, 1.0, 3.0
    contents["eval"]["top_contexts"] = [
        {"latent": 8, "max": 4.0, "examples": [{"tokens": tokens, "activations": activations}]}
    ]
    html, page = report_of(tmp_path, contents)
    assert re.findall(r'style="--a:([\d.]+)" title="(\d+)">([^<]*)<', html) == [
        ("1.00", "4", "w100"),
        ("0.25", "1", "w105"),
    ]
    assert "… w60 w61" in page.words
    assert "w119 w120 …" in page.words


def test_one_model_only(tmp_path):
    contents = run_contents(steps=100)
    contents["metrics"] = [record for record in contents["metrics"] if record["model"] == "adaptivek"]
    del contents["eval"]["models"]["topk"], contents["eval"]["l0_fvu"]["topk"]
    html, page = report_of(tmp_path, contents)
    assert "nothing to compare it with" in page.words
    assert not any(mark in html for mark in ('class="best"', 'class="key topk"', 'class="absent"'))


def test_unequal_sparsity_is_said(tmp_path):
    contents = without_plots()
    contents["eval"]["models"]["topk"]["l0_mean"] = 150.0
    assert "mean L0 of the two differs by 14.3%" in report_of(tmp_path, contents)[1].words


def test_equal_values_are_a_tie(tmp_path):
    contents = without_plots()
    contents["eval"]["models"]["topk"] = dict(contents["eval"]["models"]["adaptivek"])
    html, page = report_of(tmp_path, contents)
    assert 'class="best"' not in html
    assert "unexplained, the same as TopK" in page.words


def test_missing_optional_keys_are_named(tmp_path):
    _, page = report_of(tmp_path, {"config": {}, "metrics": [], "probe": {}, "eval": {}})
    for sentence in (
        "no “l0_fvu” curve",
        "no “k_histogram”",
        "no finite “loss”",
        "no cross-validation curve",
        "no latent with its top contexts",
        "metrics of no model",
    ):
        assert sentence in page.words, sentence
    assert page.tags.count("figure") == page.tags.count("figcaption") == 12


@pytest.mark.parametrize("selection", ["priced", "need"])
def test_missing_keys_of_a_run_at_a_price_are_named(tmp_path, selection):
    config = to_dict(TrainConfig(selection=selection))
    _, page = report_of(tmp_path, {"config": config, "metrics": [], "eval": {}})
    missing = ["no “pareto” curve", "no “pareto” of a TopK", "no “l0_histogram”", "no “spending”", "no finite “loss”"]
    for sentence in [*missing, "no walk" if selection == "priced" else "By need no candidate is passed over"]:
        assert sentence in page.words, sentence
    assert f"AdaptiveK ({selection}) SAE on smollm2, layer 15" in page.words
    assert page.tags.count("figure") == page.tags.count("figcaption") == 9


def priced_contents():
    """What a run at a price leaves, made up, with text that is hostile."""
    points = {"priced": [(16, 0.36), (64, 0.13)], "topk": [(16, 0.38), (64, 0.18)]}
    curves = {
        name: [{"l0": l0, "fvu": fvu, "low": fvu - 0.01, "high": fvu + 0.01} for l0, fvu in curve]
        for name, curve in points.items()
    }
    changes = [{"difference": [-0.02, -0.03, -0.01], "change": [-0.05, -0.07, -0.04]}] * 2
    passed = {"latent": 5, "value": 1.0, "after": 1, "alone": 0.25, "gain": 0.001, "explained_by": 9, "share": 0.75}
    walk = {
        "row": 3, "l0": 2, "before": HOSTILE[0], "token": HOSTILE[1], "after": HOSTILE[2], "price": 0.01,
        "latents": [9, 4], "values": [3.0, 0.5], "errors": [1.0, 0.2, 0.1], "others": {"topk": [1.0, 0.3, 0.2]},
        "passed": [passed, {**passed, "latent": 6, "explained_by": None, "after": 2}],
    }  # fmt: skip
    entry = {"before": "a", "token": HOSTILE[0], "after": "b", "l0": 90}
    model = run_contents(steps=1, contexts=1)["eval"]["models"]["topk"]
    rng = np.random.default_rng(0)
    return {
        "config": to_dict(TrainConfig(steps=60)),
        "metrics": [{**record, "model": name} for name in points for record in metrics_of("topk", 60, 99, rng)],
        "eval": {
            "rows": 640,
            "models": {"priced": {**model, "fvu": 0.1, "l0_mean": 64.0}, "topk": {**model, "l0_mean": 64.0}},
            "sample": {"rows": 640, "unit": "documents"},
            "pareto": {"rows": 640, "units": 12, "models": curves, "differences": {"topk": changes}},
            "l0_histogram": {"l0": [10, 64, 90], "rows": [300, 40, 300]},
            "walks": [walk],
            "spending": {
                "contexts": [{"mean": 40.0, "tokens": [" low", HOSTILE[0], " high"], "l0": [10, 50, 90]}],
                "most": [entry],
                "fewest": [{**entry, "l0": 10}],
                "kinds": [{"kind": "number", "rows": 40, "l0": 33.3}, {"kind": "punctuation", "rows": 600, "l0": 66.6}],
            },
            "top_contexts": [
                {"latent": 8, "max": 4.0, "examples": [{"tokens": [" w"], "activations": [4.0], "l0": 40.0}]}
            ],
        },
    }


def test_a_run_at_a_price_is_explained_and_drawn(tmp_path):
    html, page = report_of(tmp_path, priced_contents())
    assert not {"script", "img"} & set(page.tags)
    for sentence in (
        "goes through the 256 latents that respond most",
        "AdaptiveK (priced) leaves 10.00% of the held-out variance unexplained",
        "640 held-out rows out of 12 documents",
        "-5.0% [-7.0%, -4.0%] at 64",
        "2 latents, 2 candidates passed over, error 10.0%",
        "the price of one is 1.00% of that",
        "Latent 5 would lower the error by 25.0% alone, by 0.10% beside the others. Latent 9 explains 75%",
        "Shading runs from 10to 90 latents",
        "punctuation60066.6",
        "mean L0 40",
        "at a price",
    ):
        assert sentence in page.words, sentence
    assert "Latent 6" not in page.words
    assert re.findall(r'style="--a:([\d.]+)" title="(\d+)">([^<]*)<', html)[:3] == [
        ("0.00", "10", "low"),
        ("0.50", "50", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("1.00", "90", "high"),
    ]
    assert page.text.count(HOSTILE[1]) == 1
    assert "#0a0b0" not in html
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]*)\)", html))
    assert 'class="absent"' not in html
    first = (tmp_path / "report.html").read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_a_run_on_activations_has_no_text_and_says_so(tmp_path):
    contents = priced_contents()
    contents["config"]["activations"] = "/somewhere/layers.3.mlp_out"
    for name in ("spending", "top_contexts"):
        del contents["eval"][name]
    contents["eval"]["walks"] = [
        {name: value for name, value in walk.items() if name not in ("before", "token", "after")}
        for walk in contents["eval"]["walks"]
    ]
    contents["eval"]["sample"]["unit"] = "rows"
    _, page = report_of(tmp_path, contents)
    for sentence in (
        "AdaptiveK (priced) SAE on activations of layers.3.mlp_out",
        "no text is known of them: tokens and contexts are not shown",
        "No text is known of these activations, and so no context of a latent.",
        "held-out row 3",
        "640 held-out rows; lower is better",
    ):
        assert sentence in page.words, sentence
    assert "smollm2" not in page.words


def test_null_and_nan_values_are_left_out(tmp_path):
    contents = run_contents(steps=100, contexts=5)
    for value in (None, math.nan, math.inf):
        contents["metrics"].append({"model": "adaptivek", "phase": 2, "step": 5, "loss": value, "fvu": value})
        contents["eval"]["contexts"].append({"score": value, "predicted": value, "k": value})
    contents["eval"]["models"]["topk"]["fvu"] = math.nan
    html, page = report_of(tmp_path, contents)
    assert "nan" not in html.lower().replace("roboto", "")
    assert "k of each of 270 held-out tokens" in page.words
    assert "<td>n/a</td>" in html


def test_a_tiny_run(tmp_path):
    contents = run_contents(steps=1, contexts=1)
    _, page = report_of(tmp_path, contents)
    assert page.tags.count("figure") == 12


def test_many_contexts_are_thinned(tmp_path):
    html, page = report_of(tmp_path, run_contents(steps=30, contexts=5000))
    assert "one in 3 of 5,000 contexts is drawn" in page.words
    assert len(html) < 1_500_000


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "probe.json", "eval.json"])
def test_an_unfinished_run_names_the_missing_file(tmp_path, name):
    run = write_run(tmp_path, without_plots())
    (run / name).unlink()
    with pytest.raises(UserError, match=f"has no {re.escape(name)}.*finished"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no-such-run"):
        write_report(tmp_path / "no-such-run")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("eval.json", '{"models": ', "eval.json is not valid JSON"),
        ("probe.json", "[1]", "probe.json holds a JSON list"),
        ("metrics.jsonl", '{"step": 0}\n{"st', "line 2"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, message):
    run = write_run(tmp_path, without_plots())
    (run / name).write_text(text)
    with pytest.raises(UserError, match=message):
        write_report(run)


def test_a_failed_write_keeps_the_previous_report(tmp_path, monkeypatch):
    run = write_run(tmp_path, without_plots())
    (run / "report.html").write_text("before")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*report\.html .*No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == "before"
    assert len(list(run.iterdir())) == 5, "the half-written file is gone"


def test_importing_it_is_light_and_drawing_leaves_pyplot_alone(tmp_path):
    run = write_run(tmp_path, run_contents(steps=30, contexts=5))
    # Reading rcParams["backend"] would itself import pyplot.
    code = (
        "import sys, aksae.report as report; assert not {'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "import matplotlib; rc = matplotlib.rcParams\n"
        "settings = lambda: {key: rc[key] for key in rc if key != 'backend'}\n"
        f"before = settings(); report.write_report({str(run)!r})\n"
        "assert settings() == before and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
