"""What `aksae export` writes is loaded by SAELens, and drawn by SAEDashboard and by Neuronpedia's runner in it."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from aksae import SAE, AdaptiveK, BatchTopK, JumpReLU, KMap, ModelConfig, SAEConfig, TextConfig, TopK, TrainConfig
from aksae.config import to_dict
from aksae.export import export
from aksae.files import write_json

# SAELens says how to load the model, as the files tell it.
pytestmark = pytest.mark.filterwarnings("ignore:\\nThis SAE has non-empty model_from_pretrained_kwargs:UserWarning")

D_IN, D_SAE, LENGTH, WORDS = 16, 48, 12, 30
SELECTIONS = {"topk": TopK(5), "batch-topk": BatchTopK(5), "jumprelu": JumpReLU(5)}
TARGETS = ("hub", "saedashboard", "neuronpedia")


def host(module: str, package: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"{package} is not installed")


def run_of(name: str, selection, folder: Path) -> tuple[Path, SAE]:
    """A run's folder as far as `export` reads it, with activations of a scale of their own."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(D_IN, D_SAE, selection, input_scale=2.5, output_scale=2.5), generator=generator).eval()
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.normal_(std=0.05, generator=generator)
        if isinstance(selection, BatchTopK):
            sae.threshold.fill_(0.8)
        if isinstance(selection, JumpReLU):
            sae.log_threshold.uniform_(-1, 0.2, generator=generator)
    model, text = ModelConfig("gpt2", layer=1), TextConfig("owner/prose", context_length=LENGTH)
    write_json(folder / "config.json", to_dict(TrainConfig(folder, selection=name, model=model, text=text)))
    sae.save_pretrained(folder / name)
    return folder, sae


def rows(sae) -> torch.Tensor:
    return torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)) + sae.b_dec.detach() / 2.5


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", SELECTIONS)
def test_sae_lens_loads_it(tmp_path, name, to):
    sae_lens = host("sae_lens", "SAELens")
    run, sae = run_of(name, SELECTIONS[name], tmp_path / "run")
    export(run, tmp_path / "out", to)
    path = tmp_path / "out" / "sae_lens" if to == "hub" else tmp_path / "out"
    loaded = sae_lens.SAE.load_from_disk(path)
    about = loaded.cfg.metadata
    assert (about.model_name, about.hook_name) == ("gpt2", "blocks.1.hook_resid_post")
    assert (about.context_size, about.prepend_bos, about.dataset_path) == (LENGTH, True, "owner/prose")
    assert about.model_from_pretrained_kwargs == {"center_writing_weights": False}
    x = rows(sae)
    with torch.no_grad():
        wanted = sae(x)
        torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)
        fires = loaded.encode(x) > 0
        assert torch.equal(fires, sae.encode(x).to_dense(D_SAE) > 0)
        if to != "hub":
            # The first that SAEDashboard does.
            loaded.fold_W_dec_norm()
            torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(loaded.encode(x) > 0, fires)


def test_sae_lens_loads_adaptivek_from_a_hub_folder(tmp_path):
    sae_lens = host("sae_lens", "SAELens")
    import aksae.hosts.sae_lens  # noqa: F401 - registers the architecture

    run, sae = run_of("adaptivek", AdaptiveK(KMap(k_min=2, k_max=9), "token"), tmp_path / "run")
    export(run, tmp_path / "out", "hub")
    loaded, x = sae_lens.SAE.load_from_disk(tmp_path / "out" / "sae_lens"), rows(sae)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def tiny(tmp_path):
    """A random model of TransformerLens of two blocks, with a tokenizer of words."""
    # What it depends on contradicts the other hosts: CONTRIBUTING.md says how to run these tests.
    host("sae_dashboard.neuronpedia.neuronpedia_runner", "sae-dashboard")
    import sae_lens
    import transformer_lens
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: number for number, name in enumerate(["<s>", *(f"w{i}" for i in range(1, WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<s>")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=D_IN, n_ctx=LENGTH, d_head=8, n_heads=2, d_vocab=WORDS, act_fn="relu", device="cpu", seed=0
    )
    # TransformerLens reads it once more, from where it came.
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "words")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "words")
    return sae_lens.HookedSAETransformer(config, tokenizer=fast)


# Of SAEDashboard and what it imports.
quietly = pytest.mark.filterwarnings("ignore")


@quietly
@pytest.mark.parametrize("name", SELECTIONS)
def test_sae_dashboard_draws_it(tmp_path, tiny, name):
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE as Hosted

    run, sae = run_of(name, SELECTIONS[name], tmp_path / "run")
    export(run, tmp_path / "out", "saedashboard")
    loaded = Hosted.load_from_disk(tmp_path / "out")
    tokens = torch.randint(1, WORDS, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    hook = loaded.cfg.metadata.hook_name
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tokens, names_filter=hook)
        dense = sae.encode(cache[hook]).to_dense(D_SAE)
    features = dense.flatten(0, 1).gt(0).sum(0).argsort(descending=True)[:3].tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        data = SaeVisRunner(SaeVisConfig(hook_point=hook, features=features)).run(loaded, tiny, tokens)
    for feature in features:
        shown = data.feature_data_dict[feature].acts_histogram_data.title
        density = dense[..., feature].gt(0).float().mean()
        assert f"{density:.3%}" in shown, shown
    save_feature_centric_vis(sae_vis_data=data, filename=tmp_path / "dashboard.html")
    assert (tmp_path / "dashboard.html").stat().st_size > 10_000


@quietly
def test_neuronpedias_runner_draws_it(tmp_path, tiny, monkeypatch):
    from sae_dashboard.neuronpedia import neuronpedia_runner
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig

    run, _ = run_of("topk", SELECTIONS["topk"], tmp_path / "run")
    export(run, tmp_path / "out", "neuronpedia")
    monkeypatch.chdir(tmp_path)
    text = torch.randint(1, WORDS, (200, LENGTH + 2), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "prose").mkdir()
    lines = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in text)
    (tmp_path / "prose" / "train.jsonl").write_text("\n".join(lines))
    asked = []

    def model(*arguments, model_name, **options):
        asked.append(model_name)
        return tiny

    monkeypatch.setattr(neuronpedia_runner.HookedSAETransformer, "from_pretrained", model)
    config = NeuronpediaRunnerConfig(
        sae_set="ours",
        sae_path="out",
        np_set_name="ours",
        from_local_sae=True,
        outputs_dir="dashboards",
        huggingface_dataset_path="prose",
        n_prompts_total=64,
        n_tokens_in_prompt=LENGTH,
        n_prompts_in_forward_pass=32,
        n_features_at_a_time=D_SAE,
        sparsity_threshold=1,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        neuronpedia_runner.NeuronpediaRunner(config).run()
    assert asked == ["gpt2"]
    (batch,) = (tmp_path / "dashboards").rglob("batch-0.json")
    drawn = json.loads(batch.read_text())
    assert (drawn["model_id"], drawn["layer"], drawn["sae_set"]) == ("gpt2", 1, "ours")
    assert len(drawn["features"]) == D_SAE
