"""Complexity labels: measured, read from a file, from a model's loss, and from an endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from aksae import complexity, data, llm_labels, prose, text_stats
from aksae.complexity import score_contexts
from aksae.config import LabelConfig
from aksae.errors import UserError
from aksae.rubric import DIMENSIONS, combine
from aksae.text import ContextSet

SIMPLE = "The cat sat on the mat. The dog ran to the park. We like to play. It is fun."
PLAIN = "The man went down to the river to fish. He had not seen one for weeks, but he was happy to sit in the sun."
HARD = (
    "Although the transcendental unity of apperception presupposes the possibility of synthetic judgements, the "
    "categories nevertheless remain inapplicable to noumena, whose cognition is thereby precluded."
)


def contexts_of(*texts: str) -> ContextSet:
    ids = np.arange(len(texts) * 4, dtype=np.int32).reshape(-1, 4)
    mask = np.ones(ids.shape, bool)
    return ContextSet(ids, mask, mask, list(texts), np.arange(len(texts), dtype=np.int32))


def scores_of(*texts: str, **settings) -> np.ndarray:
    scores = score_contexts(contexts_of(*texts), LabelConfig(**settings), progress=False)
    assert scores.dtype == np.float32
    assert scores.shape == (len(texts),)
    return scores


def test_the_weights_are_the_papers():
    assert [dimension.weight for dimension in DIMENSIONS.values()] == [0.2, 0.2, 0.25, 0.15, 0.1, 0.1]
    assert combine(dict.fromkeys(DIMENSIONS, 10.0)) == 10.0
    ratings = dict(zip(DIMENSIONS, [2, 2, 4, 4, 5, 6]))
    assert combine(ratings) == 3.5


def test_an_unknown_scorer_is_bad_input():
    with pytest.raises(UserError, match=r"labels\.scorer: got 'guess'"):
        scores_of(SIMPLE, scorer="guess")


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_when_asked_for(tmp_path, capsys, progress):
    path = write_labels(tmp_path / "labels.jsonl", [{"text": "1", "complexity_score": 1}])
    model = LossModel([1.0])
    for config in (LabelConfig(), LabelConfig(scorer="surprisal"), LabelConfig(scorer="file", file=path)):
        score_contexts(contexts_of("1"), config, model=model, progress=progress)
        assert ("label" in capsys.readouterr().err) == progress


# text-stats


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("text-stats must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_text_stats_orders_texts_as_a_reader_would(no_network):
    simple, plain, hard = scores_of(SIMPLE, PLAIN, HARD)
    assert simple < plain < hard
    assert simple < 2
    assert hard > 7


def test_text_stats_depends_on_the_text_alone_and_has_one_decimal():
    together = scores_of(SIMPLE, HARD, PLAIN, HARD)
    assert together[1] == together[3] == scores_of(HARD)[0]
    np.testing.assert_array_equal(together, np.round(together.astype(float), 1).astype(np.float32))
    assert scores_of().shape == (0,)


def test_text_stats_of_no_words_is_nan_and_of_odd_texts_is_in_range():
    assert np.isnan(scores_of("", "1 2 3", "= = !?")).all()
    odd = scores_of("x", "a" * 20_000, "Ünïcödé 语言 слово", "word " * 5000, "(" * 500 + "word", "\n\n.\tA. B! ")
    assert ((odd >= 0) & (odd <= 10)).all()


CHANGES = {
    "lexical": ("We use big cars to go to work.", "We utilise sizeable automobiles to commute to employment."),
    "syntactic": ("We left. It rained. We had no coats.", "We left while it rained, although, sadly, we had no coats."),
    "conceptual": ("It was there, and so were they.", "Freedom demands responsibility, argument, education."),
    "domain": ("The man put his hand on the table and left.", "The RFC_2616 parser.py calls b64decode() on TCP/IP."),
    "logic": ("It is big and it is red and it is ours.", "If it is not big, then it is not red, unless it is ours."),
    "context": ("Dogs eat meat and cats eat fish.", "These eat the former and those eat the latter."),
}


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_each_dimension_rises_with_what_it_measures(dimension):
    low, high = (text_stats.ratings(text) for text in CHANGES[dimension])
    assert set(low) == set(DIMENSIONS)
    assert high[dimension] > low[dimension] + 1


def test_the_scale_is_monotone_and_meets_its_anchors():
    values = [text_stats._rate(value, 2.0, 4.0) for value in np.linspace(-5, 11, 200)]
    assert (np.diff(values) > 0).all()
    assert text_stats._rate(2.0, 2.0, 4.0) == pytest.approx(2)
    assert text_stats._rate(4.0, 2.0, 4.0) == pytest.approx(8)
    assert 0 <= text_stats._rate(-1e9, 2.0, 4.0) < 1e-9
    assert 10 - 1e-9 < text_stats._rate(1e9, 2.0, 4.0) <= 10


@pytest.mark.slow
def test_text_stats_spreads_real_prose():
    pieces = [document[:550] for document in prose.documents()]
    scores = scores_of(*pieces)
    assert 4 < scores.mean() < 6
    assert scores.std() > 0.8
    assert np.mean((scores < 1) | (scores > 9)) < 0.01


# surprisal


class LossModel:
    """Knows the mean loss of each context by its first token."""

    def __init__(self, losses):
        self.losses = torch.tensor(losses)
        self.batches = []

    def token_losses(self, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape
        self.batches.append(len(input_ids))
        return self.losses[torch.as_tensor(input_ids)[:, 0].long() // 4]


def test_surprisal_maps_1_to_6_nats_linearly_and_keeps_nan(monkeypatch):
    monkeypatch.setattr(complexity, "LOSS_TOKENS", 12)
    losses = [0.5, 1.0, 2.25, 3.5, 6.0, 9.0, float("nan"), 5.0, 1.5, 4.0, 1.0]
    model = LossModel(losses)
    contexts = contexts_of(*map(str, losses))
    scores = score_contexts(contexts, LabelConfig(scorer="surprisal"), model=model, progress=False)
    np.testing.assert_allclose(scores, [0, 0, 2.5, 5, 10, 10, np.nan, 8, 1, 6, 0], rtol=1e-6)
    assert scores.dtype == np.float32
    assert model.batches == [3, 3, 3, 2]


def test_surprisal_needs_a_model():
    with pytest.raises(UserError, match="surprisal needs a language model"):
        scores_of(SIMPLE, scorer="surprisal")


# file


def write_labels(path, rows: list[dict]):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_file_scores_are_matched_by_text(tmp_path, kind):
    rows = [{"body": PLAIN.replace(" ", "\n  "), "c": 3}, {"body": "other", "c": 1.0}, {"body": HARD, "c": 10.0}]
    path = write_labels(tmp_path / f"labels.{kind}", [*rows, rows[0]])
    settings = {"scorer": "file", "file": path, "text_column": "body", "score_column": "c"}
    np.testing.assert_array_equal(scores_of(HARD, SIMPLE, f" {PLAIN}\n", HARD, **settings), [10, np.nan, 3, 10])


BAD_ROWS = {
    "null": ({"text": "b", "complexity_score": None}, r"column 'complexity_score' got None"),
    "nan": ({"text": "b", "complexity_score": float("nan")}, r"column 'complexity_score' got nan"),
    "too large": ({"text": "b", "complexity_score": 10.5}, r"got 10.5, needs a number from 0 to 10"),
    "negative": ({"text": "b", "complexity_score": -0.1}, r"got -0.1, needs a number from 0 to 10"),
    "text": ({"text": None, "complexity_score": 1.0}, r"column 'text' got None, needs a string"),
    "conflict": ({"text": "a", "complexity_score": 2.0}, r"gives score 2.0, .*earlier: 1.0"),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, kind, row, message):
    path = write_labels(tmp_path / f"labels.{kind}", [{"text": "a", "complexity_score": 1.0}, row])
    with pytest.raises(UserError, match=message) as raised:
        scores_of("a", scorer="file", file=path)
    assert str(raised.value).startswith(f"labels.file: {path}, row 2: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"}', r"row 2 has no column 'complexity_score'; it has 'text'"),
        ('{"text": "b", "complexity_score": "5"}', r"row 2: column 'complexity_score' got '5'"),
        ('{"text": "b", "complexity_score": true}', r"row 2: column 'complexity_score' got True"),
        ('{"text": "b", "complexity_score": Infinity}', r"row 2: column 'complexity_score' got inf"),
        ('{"text": "b", "complexity', r"row 2 is not JSON"),
    ],
)
def test_a_bad_jsonl_row_is_named(tmp_path, line, message):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"text": "a", "complexity_score": 1}\n' + line)
    with pytest.raises(UserError, match=message):
        scores_of("a", scorer="file", file=path)


def test_a_file_that_cannot_serve_is_bad_input(tmp_path):
    other = write_labels(tmp_path / "labels.parquet", [{"text": "other", "score": 1.0}])
    with pytest.raises(UserError, match="has no column 'complexity_score'; it has 'text', 'score'"):
        scores_of("a", scorer="file", file=other)
    with pytest.raises(UserError, match=r"none of the 1 contexts is among the 1 texts of .*labels.parquet"):
        scores_of("a", scorer="file", file=other, score_column="score")
    with pytest.raises(UserError, match=r"labels\.file: got none"):
        scores_of("a", scorer="file")
    with pytest.raises(UserError, match=r"needs an existing \.parquet or \.jsonl file"):
        scores_of("a", scorer="file", file=tmp_path / "nowhere.jsonl")


# llm


class Endpoint:
    """An OpenAI-compatible server; `answer(text, tries)` gives the status and the content of the reply."""

    def __init__(self):
        self.requests: list[dict] = []
        self.tries: Counter[str] = Counter()
        self.answer: Callable[[str, int], tuple[int, str]] = lambda text, tries: (200, ratings_for(text))
        self.headers: dict[str, str] = {}
        self.lists, self.list_status = 0, 404
        self.in_flight = self.most_in_flight = 0
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with lock:
                    endpoint.lists += 1
                self.send_response(endpoint.list_status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with lock:
                    endpoint.requests.append(body)
                    endpoint.tries[text] += 1
                    tries = endpoint.tries[text]
                    endpoint.in_flight += 1
                    endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
                try:
                    status, content = endpoint.answer(text, tries)
                finally:
                    with lock:
                        endpoint.in_flight -= 1
                if status == 0:
                    self.close_connection = True
                    return
                message = {"role": "assistant", "content": content}
                reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
                reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
                payload = json.dumps(reply if status == 200 else {"error": {"message": content}}).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **endpoint.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                with contextlib.suppress(ConnectionError):  # a run that stopped early has hung up
                    self.end_headers()
                    self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


def ratings_for(text: str, **changes) -> str:
    return json.dumps({**dict.fromkeys(DIMENSIONS, float(len(text) % 11)), **changes})


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(llm_labels, "_FIRST_DELAY_S", 0.001)
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.01,))
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


@pytest.fixture
def rate(endpoint, tmp_path) -> Callable:
    def rate(*texts: str, **settings) -> np.ndarray:
        config = LabelConfig(**{"scorer": "llm", "base_url": endpoint.url, "concurrency": 3, **settings})
        return score_contexts(contexts_of(*texts), config, cache=tmp_path / "cache", progress=False)

    return rate


def cached(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "cache" / llm_labels.CACHE_NAME).read_text().splitlines()]


def test_llm_asks_as_the_paper_does_and_weights_here(endpoint, rate):
    endpoint.answer = lambda text, tries: (200, json.dumps(dict(zip(DIMENSIONS, [10, 0, 8.0, 0, 0, 5])) | {"x": "y"}))
    np.testing.assert_allclose(rate("one", "two", "one"), [4.5] * 3)
    assert sorted(body["messages"][-1]["content"] for body in endpoint.requests) == ["one", "two"]
    for body in endpoint.requests:
        assert body["temperature"] == 0.1
        assert body["response_format"] == {"type": "json_object"}
        assert body["model"] == "gpt-4.1-mini"
        assert all(f"- {name}: " in body["messages"][0]["content"] for name in DIMENSIONS)


def test_llm_keeps_the_number_of_requests_in_flight(endpoint, rate):
    released = threading.Barrier(3, timeout=10)

    def answer(text, tries):
        released.wait()
        return 200, ratings_for(text)

    endpoint.answer = answer
    texts = [f"text {i}" for i in range(12)]
    assert not np.isnan(rate(*texts)).any()
    assert endpoint.most_in_flight == 3


TEMPORARY = {
    "rate limit": (429, "slow down"),
    "server error": (500, "oops"),
    "overloaded": (503, "busy"),
    "dropped connection": (0, ""),
    "no json": (200, "The text is quite complex."),
    "no object": (200, "[1, 2, 3, 4, 5, 6]"),
    "missing rating": (200, json.dumps({"lexical": 3})),
    "out of range": (200, ratings_for("x", logic=11)),
    "negative": (200, ratings_for("x", logic=-1)),
    "string": (200, ratings_for("x", logic="7")),
    "bool": (200, ratings_for("x", logic=True)),
    "nan": (200, ratings_for("x", logic=float("nan"))),
    "nothing": (200, None),
}


@pytest.mark.parametrize("trouble", TEMPORARY.values(), ids=TEMPORARY)
def test_llm_tries_again_after_trouble_that_may_pass(endpoint, rate, tmp_path, trouble):
    endpoint.answer = lambda text, tries: trouble if tries < 3 else (200, ratings_for(text))
    np.testing.assert_allclose(rate("12345", max_retries=3), [5])
    assert endpoint.tries == {"12345": 3}
    assert len(cached(tmp_path)) == 1


def test_llm_failures_are_nan_never_cached_and_tried_again_by_the_next_run(endpoint, rate, tmp_path):
    endpoint.answer = lambda text, tries: (200, ratings_for(text)) if text == "good" else (500, "oops")
    np.testing.assert_array_equal(rate("bad", "good", "bad", max_retries=2), [np.nan, 4, np.nan])
    assert endpoint.tries == {"bad": 2, "good": 1}
    assert len(cached(tmp_path)) == 1
    endpoint.answer = lambda text, tries: (200, ratings_for(text))
    np.testing.assert_array_equal(rate("bad", "good", "bad"), [3, 4, 3])
    assert endpoint.tries == {"bad": 3, "good": 1}


def test_llm_refusal_of_one_text_fails_it_at_once(endpoint, rate):
    endpoint.answer = lambda text, tries: (400, "content filter") if text == "bad" else (200, ratings_for(text))
    np.testing.assert_array_equal(rate("bad", "good"), [np.nan, 4])
    assert endpoint.tries["bad"] == 1


def test_llm_backs_off_exponentially_and_as_long_as_the_server_asks(endpoint, rate, monkeypatch):
    waits = []
    sleep = asyncio.sleep

    async def record(seconds, *args):
        if seconds:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(llm_labels, "_FIRST_DELAY_S", 1.0)
    monkeypatch.setattr(llm_labels.asyncio, "sleep", record)
    endpoint.answer = lambda text, tries: (500, "oops")
    assert np.isnan(rate("bad", max_retries=4)).all()
    assert len(waits) == 3
    assert all(0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits))
    endpoint.headers = {"Retry-After": "7"}
    endpoint.answer = lambda text, tries: (429, "slow down")
    assert np.isnan(rate("bad", max_retries=2)).all()
    assert waits[3:] == [7.0]


def test_llm_resumes_without_asking_again(endpoint, rate, tmp_path):
    texts = [f"text {i} {'x' * i}" for i in range(9)]
    first = rate(*texts[:6])
    assert len(endpoint.requests) == 6
    np.testing.assert_array_equal(rate(*texts[:6]), first)
    assert len(endpoint.requests) == 6
    assert not np.isnan(rate(*texts)).any()
    assert len(endpoint.requests) == 9
    rate(texts[0], model="another")
    assert len(endpoint.requests) == 10, "another model is another key"


def test_llm_cache_survives_a_line_cut_off_and_lines_that_lie(endpoint, rate, tmp_path):
    texts = ["1", "22", "333"]
    first = rate(*texts, concurrency=1)
    path = tmp_path / "cache" / llm_labels.CACHE_NAME
    lines = path.read_text().splitlines(keepends=True)
    forged = json.loads(lines[1]) | {"ratings": {"lexical": 99}}
    path.write_text(lines[0] + json.dumps(forged) + "\nnull\n" + lines[2][:-30])
    np.testing.assert_array_equal(rate(*texts), first)
    assert endpoint.tries == {"1": 1, "22": 2, "333": 2}
    np.testing.assert_array_equal(rate(*texts), first)
    assert len(endpoint.requests) == 5, "the lines after the cut one must be whole"


def test_llm_answers_are_kept_when_the_run_stops_early(endpoint, rate, tmp_path):
    endpoint.answer = lambda text, tries: (200, ratings_for(text)) if text != "bad" else (401, "no such key")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        rate("a", "bb", "bad", "dddd", concurrency=1)
    assert len(cached(tmp_path)) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_llm_refused_key_or_model_is_bad_input(endpoint, rate, status):
    endpoint.answer = lambda text, tries: (status, "refused")
    with pytest.raises(UserError, match=rf"labels.model: .* refuses 'gpt-4.1-mini' with status {status} .*refused"):
        rate("a", "b", "c", "d")
    assert len(endpoint.requests) <= 4


def test_llm_endpoint_that_is_not_there_is_bad_input(endpoint, rate):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=r"labels\.base_url: no connection to http://127\.0\.0\.1"):
            rate(*map(str, range(40)), base_url=url, max_retries=2)


@pytest.mark.parametrize("status", [200, 401, 404, 500])
def test_llm_asks_whether_the_endpoint_is_there_before_anything_that_costs(endpoint, rate, status):
    endpoint.list_status = status
    np.testing.assert_array_equal(rate("12345", "1"), [5, 1])
    assert endpoint.lists == 1, "any answer will do"
    rate("12345", "1")
    assert endpoint.lists == 1, "nothing is asked where all answers are known"


def test_llm_endpoint_that_is_not_there_costs_one_request(endpoint, rate, monkeypatch):
    asked = []
    monkeypatch.setattr(llm_labels, "_ask", lambda *args: asked.append(args))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"labels\.base_url: no connection to"):
            rate("a", "b", base_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1", max_retries=2)
    assert not asked


def test_llm_answers_of_one_endpoint_are_not_taken_for_anothers(endpoint, rate, monkeypatch):
    rate("12345")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url + "/")
    rate("12345", base_url=None)
    assert len(endpoint.requests) == 1, "the same endpoint"
    rate("12345", base_url=endpoint.url.replace("127.0.0.1", "localhost"))
    assert len(endpoint.requests) == 2


# kept


@pytest.fixture
def keep(tmp_path, monkeypatch) -> Callable:
    """Scores of contexts by way of the cache, and how often they were computed."""
    calls = []
    monkeypatch.setattr(data, "score_contexts", lambda *args, **rest: calls.append(1) or score_contexts(*args, **rest))

    def kept(model=None, **settings):
        scores = data._scores(contexts_of(SIMPLE, HARD), model, LabelConfig(**settings), tmp_path)
        return scores.tolist(), len(calls)

    return kept


def test_kept_scores_are_those_of_the_same_statistics(keep, tmp_path, monkeypatch):
    expected, _ = keep()
    assert keep() == (expected, 1)
    monkeypatch.setattr(text_stats, "identity", lambda: "another release")
    assert keep() == (expected, 2)
    assert len(list(tmp_path.iterdir())) == 2


def test_kept_scores_are_those_of_the_same_model(keep):
    model = LossModel([1.0, 3.5])
    model.identity = {"model weights": "1", "model.layer": 3}
    assert keep(model, scorer="surprisal") == ([0, 5], 1)
    model.identity = {"model weights": "1", "model.layer": 4}
    assert keep(model, scorer="surprisal") == ([0, 5], 1), "a loss is that of no layer"
    model.identity = {"model weights": "2", "model.layer": 3}
    model.losses = torch.tensor([6.0, 1.0])
    assert keep(model, scorer="surprisal") == ([10, 0], 2)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "truncate", "other"])
def test_kept_scores_that_are_damaged_are_computed_again(keep, tmp_path, damage):
    expected, _ = keep()
    (path,) = tmp_path.iterdir()
    if damage == "other":
        np.save(path, np.zeros(3, np.float32))
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == "truncate" else damage)
    assert keep() == (expected, 2)
    assert keep() == (expected, 2)


def test_llm_settings_out_of_range(endpoint, rate):
    for name in ("concurrency", "max_retries"):
        with pytest.raises(UserError, match=f"labels.{name}: got 0, needs at least 1"):
            rate("a", **{name: 0})
    with pytest.raises(UserError, match="needs a key in OPENAI_API_KEY"):
        rate("a", base_url=None)


def test_llm_works_without_a_cache_and_inside_a_running_loop(endpoint):
    config = LabelConfig(scorer="llm", base_url=endpoint.url)

    async def notebook():
        return score_contexts(contexts_of("12345"), config, progress=False)

    np.testing.assert_array_equal(asyncio.run(notebook()), [5])
