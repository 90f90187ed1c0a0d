"""fp32 encodes of 16 rows and more find candidates on bf16 units: no winner may be lost.

A call of fewer rows knows no candidates: it multiplies every latent, with the same dot product. So both must agree bit
by bit, whatever the numbers, the shapes and the threads are.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import CASES
from test_dispatch import isas, needs_cpu, run_python

from aksae_kernels import available_backends, topk_encode, use_backend
from aksae_kernels.testing import check_codes, encode_scores

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]  # x, W, b, k
BF16_UNITS = ("amx", "avx512_bf16", "emulated_bf16")
PLAIN = ("baseline", "avx2", "avx512")
# Whose results pass fp32's range, where the contract's relative bound says nothing.
BEYOND_FP32 = ("tiny", "huge", "scales of latents", "specials")


def lean(t: torch.Tensor, low_bits: int) -> torch.Tensor:
    """The numbers with other low bits: 0x7fff loses all it can when rounded to bf16, 0x8001 wins all it can."""
    return (t.contiguous().view(torch.int32) & ~0xFFFF | low_bits).view(torch.float32)


def problems() -> dict[str, Problem]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    found: dict[str, Problem] = {}
    for rows, d_in, d_sae, k in (
        (16, 1, 15, 3),
        (17, 31, 65, 65),
        (31, 33, 127, 0),
        (33, 65, 1000, 20),
        (65, 769, 513, 30),
        (16, 0, 300, 9),
        (18, 2, 1, 1),
        (20, 9, 0, 1),
        # More than one chunk of W, with fewer blocks of rows than threads.
        (16, 768, 3300, 40),
        (32, 3000, 1500, 20),
        (64, 768, 3300, 64),
    ):
        x, W, b = randn(rows, d_in), randn(d_sae, d_in) / math.sqrt(max(1, d_in)), randn(d_sae) / 4
        found[f"random {rows}x{d_in}x{d_sae}"] = x, W, b, k

    # Where the bound is nearly met, and scores differ by less than rounding to bf16 loses.
    found["one column"] = randn(40, 1), randn(1, 1) + 2e-3 * randn(3000, 1), None, 20
    W = randn(1, 6).abs() + 1e-3 * randn(2000, 6)
    W[::2], W[1::2] = lean(W[::2], 0x7FFF), lean(W[1::2], 0x8001)
    found["latents rounded apart"] = randn(32, 6).abs(), W, None, 30
    # Rows are ones to bf16; what that loses tells the winners apart, which by the sum of their signs are second.
    sign = torch.ones(2048)
    sign[torch.randperm(2048, generator=generator)[:948]] = -1
    losers = sign[torch.rand((200, 2048), generator=generator).argsort(-1)]
    losers[torch.arange(200), losers.argmin(-1)] = 1
    W = torch.cat([losers, sign.expand(40, -1), -torch.ones(1000, 2048)])
    found["row rounded away"] = (1 + 0.9 * 2**-9 * sign).expand(20, -1), W, None, 40
    found["last-bit ties"] = randn(33, 40), randn(1, 40) * (1 + 2.0**-23 * integers(3, 4000, 1)), None, 50
    found["equal latents"] = randn(16, 40), randn(1, 40).repeat(3000, 1), None, 50
    # Every score five times: few enough for the row to go by its candidates.
    found["ties among candidates"] = randn(40, 60), randn(400, 60).repeat(5, 1), None, 33
    found["common part"] = randn(1, 200) * 100 + randn(48, 200), randn(1, 200) + 1e-3 * randn(1500, 200), None, 40
    x, W = randn(32, 100), randn(1500, 100)
    found["bias cancels"] = x, W, 1e-4 * randn(1500) - W @ x[0], 40
    ascending = torch.linspace(0.5, 1, 3000).unsqueeze(1) * randn(1, 64).abs()
    found["ascending"] = randn(32, 64).abs(), ascending, None, 40
    found["descending"] = randn(32, 64).abs(), ascending.flip(0), None, 40
    found["zero rows"] = (
        randn(32, 50) * integers(2, 32, 1),
        randn(900, 50) * integers(2, 900, 1),
        integers(2, 900) * 1e-30,
        300,
    )
    found["tiny"] = randn(32, 50) * 1e-25, randn(900, 50) * 1e-15, None, 20
    found["huge"] = randn(32, 50) * 1e18, randn(900, 50) * 1e19, randn(900) * 1e38, 20
    found["scales of latents"] = randn(32, 50), randn(900, 50) * 10.0 ** (integers(61, 900, 1) - 30).float(), None, 400
    found["large bias"] = randn(32, 50), randn(900, 50), randn(900) * 1e30, 20
    x, W, b = randn(48, 50), randn(900, 50), randn(900)
    x[3, 4], x[5, 6], x[7] = math.nan, math.inf, 1e30
    W[100, 1], W[200, 2], W[300, 3], W[400] = math.nan, math.inf, -math.inf, 3e38
    b[500], b[600], b[700], b[800] = math.nan, math.inf, -math.inf, 3e38
    found["specials"] = x, W, b, 20
    return found


def bits(codes) -> list[torch.Tensor]:
    return [codes.values.view(torch.int32), codes.indices, codes.counts]


def by_few_rows(x, W, b, k: torch.Tensor, k_max: int) -> list[torch.Tensor]:
    calls = [bits(topk_encode(x[i : i + 15], W, b, k=k[i : i + 15], k_max=k_max)) for i in range(0, len(x), 15)]
    return [torch.cat(parts) for parts in zip(*calls, strict=True)]


def wrong_problems() -> dict[str, str]:
    """Run in a fresh interpreter under one AKSAE_CPU_ISA: what is wrong, by problem."""
    wrong = {}
    with use_backend("cpu"):
        for name, (x, W, b, k) in problems().items():
            ragged = torch.arange(len(x)) * 7 % (k + 1)
            ragged[-1] = k
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                codes = topk_encode(x, W, b, k=ragged)
                if torch.ops.aksae_cpu.isa() in BF16_UNITS:
                    expected = by_few_rows(x, W, b, ragged, k)
                    if not all(torch.equal(a, e) for a, e in zip(bits(codes), expected, strict=True)):
                        wrong[name] = f"{threads} threads: not the bits of a call of few rows"
                        break
                if name not in BEYOND_FP32 and threads < 3:
                    scores, bound = encode_scores(x, W, b)
                    try:
                        check_codes(codes, scores, ragged, tolerance=bound)
                    except AssertionError as error:
                        wrong[name] = f"{threads} threads: {error}"
                        break
    return wrong


_wrong: dict[str, dict[str, str]] = {}


@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize("isa", BF16_UNITS)
def test_no_winner_is_lost(isa, name):
    check(isa, name)


@pytest.mark.parametrize("name", problems())
def test_within_the_contract_without_bf16_units(name):
    check([isa for isa in isas() if isa in PLAIN][-1], name)


def check(isa: str, name: str) -> None:
    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available")
    if isa not in isas():
        pytest.skip(f"this machine has no {isa}")
    if isa not in _wrong:
        code = "import json, test_screen; print(json.dumps(test_screen.wrong_problems()))"
        try:
            _wrong[isa] = json.loads(run_python(code, AKSAE_CPU_ISA=isa).splitlines()[-1])
        except AssertionError as crash:
            _wrong[isa] = dict.fromkeys(problems(), f"the interpreter did not finish: {crash}")
    assert name not in _wrong[isa], _wrong[isa][name]


@needs_cpu
def test_flushing_denormal_numbers_loses_no_winner():
    # Products on both sides of 2^-126. Flushing is set for a thread, so there may be no other.
    x, W = torch.randn(32, 50) * 1e-23, torch.randn(900, 50) * 1e-15
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        with use_backend("cpu"):
            codes, few = topk_encode(x, W, k=20), topk_encode(x[:10], W, k=20)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert codes.counts.min() > 0
    scores, bound = encode_scores(x, W)
    check_codes(codes, scores, 20, tolerance=bound + 100 * torch.finfo(torch.float32).smallest_normal)
    if torch.ops.aksae_cpu.isa() in BF16_UNITS:
        assert all(torch.equal(a[:10], b) for a, b in zip(bits(codes), bits(few), strict=True))


# Backends that screen too, and say nothing of the bits of a call of few rows.
OTHERS = [case for case in CASES if case.id.endswith("fp32") and case.values[0].backend not in ("cpu", "reference")]


@pytest.mark.parametrize("fp32", OTHERS, indirect=True)
@pytest.mark.parametrize("name", problems())
def test_other_backends_encode_them(fp32, name):
    x, W, b, k = (t.to(fp32.device) if isinstance(t, torch.Tensor) else t for t in problems()[name])
    if name == "specials":
        # With them the order of a sum says whether infinities meet.
        x[7], W[400] = 1, 1
    ragged = torch.arange(len(x), device=fp32.device) * 7 % (k + 1)
    codes = topk_encode(x, W, b, k=ragged, k_max=k)
    if name not in BEYOND_FP32:
        scores, bound = encode_scores(x, W, b)
        check_codes(codes, scores, ragged, k, tolerance=bound)
        return
    # Scores so far apart that the order of a sum decides nothing.
    with use_backend("reference"):
        expected = topk_encode(x, W, b, k=ragged, k_max=k)
    assert torch.equal(codes.counts, expected.counts)
    assert torch.equal(codes.indices, expected.indices)
