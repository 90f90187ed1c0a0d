"""Batches for training: every row once an epoch, the same again after a resume, shares of several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from aksae import SAE, FitConfig, SAEConfig, TopK, UserError, fit
from aksae.callbacks import Callback
from aksae.mixing import MixedBatches
from aksae.prefetch import prefetched

ROOT = Path(__file__).resolve().parent.parent
D = 4


@dataclass
class Rows:
    """A block whose rows say which they are."""

    first: int
    n: int
    read: list[int] = field(default_factory=list)

    def checked(self):
        self.read.append(self.first)
        return torch.arange(self.first, self.first + self.n).float()[:, None].repeat(1, D)


def blocks(sizes=(7, 1, 0, 12, 5, 9, 3, 11, 2)):
    return [Rows(sum(sizes[:i]), n) for i, n in enumerate(sizes)]


def taken(batches, n):
    return [batch.x[:, 0].int().tolist() for batch, _ in zip(batches, range(n))]


@pytest.mark.parametrize("batch_size", [1, 8, 50, 137])
@pytest.mark.parametrize("buffer_rows", [1, 30, 1000])
def test_every_row_once_an_epoch_and_each_epoch_in_another_order(batch_size, buffer_rows):
    batches = taken(MixedBatches(blocks(), batch_size, buffer_rows=buffer_rows), 150 // batch_size + 1)
    drawn = [row for batch in batches for row in batch]
    epochs = [drawn[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sum(abs(a - b) == 1 for a, b in zip(epochs[0], epochs[0][1:])) < 15


def test_the_seed_decides():
    first, same, other = (taken(MixedBatches(blocks(), 8, buffer_rows=20, seed=s), 20) for s in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize("buffer_rows", [1, 30, 1000])
def test_after_a_resume_the_very_batches_go_on(buffer_rows):
    whole = taken(MixedBatches(blocks(), 8, buffer_rows=buffer_rows), 40)
    for step in range(30):
        batches = MixedBatches(blocks(), 8, buffer_rows=buffer_rows)
        iterator = iter(batches)
        for _ in range(step):
            next(iterator)
        # What was read ahead of the consumer does not count.
        time.sleep(0.001)
        resumed = MixedBatches(blocks(), 8, buffer_rows=buffer_rows)
        resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
        assert taken(resumed, 10) == whole[step : step + 10]


def test_a_resume_reads_no_block_that_is_done():
    made = [Rows(10 * i, 10) for i in range(100)]
    batches = MixedBatches(made, 10, buffer_rows=40)
    state = batches.state_dict()
    batches.load_state_dict(state | {"taken": 90})
    next(iter(batches))
    assert sum(len(block.read) for block in made) < 40


@pytest.mark.parametrize(("name", "value"), [("batch_size", 4), ("seed", 1), ("buffer_rows", 100)])
def test_a_resume_with_other_settings_is_refused(name, value):
    settings = {"batch_size": 8, "seed": 0, "buffer_rows": 50}
    state = MixedBatches(blocks(), **settings).state_dict()
    with pytest.raises(UserError, match=f"{name}: got {value}, needs {settings[name]}, as in the run that goes on"):
        MixedBatches(blocks(), **{**settings, name: value}).load_state_dict(state)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("seed", -1)])
def test_settings_out_of_range(name, value):
    with pytest.raises(UserError, match=f"{name}: got {value}, needs"):
        MixedBatches(blocks(), **{"batch_size": 8, "buffer_rows": 8, name: value})


class CutOff(Callback):
    def on_step(self, run, group):
        if run.step == 17:
            raise KeyboardInterrupt


def test_a_run_that_is_cut_off_ends_with_the_same_bits(tmp_path):
    def run(folder, *callbacks):
        x = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
        made = [Rows(i, 10) for i in range(0, 300, 10)]
        for block in made:
            block.checked = lambda block=block: x[block.first : block.first + 10]
        sae = SAE(SAEConfig(D, 16, TopK(3)), generator=torch.Generator().manual_seed(1))
        config = FitConfig(steps=40, checkpoint_every=5, resume=folder)
        fit(sae, MixedBatches(made, 32, buffer_rows=64), config, callbacks)
        return sae.state_dict()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", CutOff())
    whole, cut = run(tmp_path / "whole"), run(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "aksae-prefetch"]


def settled(check, seconds=5.0):
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.01)
    return check()


def test_no_more_is_read_ahead_than_asked():
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield i

    ahead = prefetched(source(), 3)
    assert next(ahead) == 0
    # Three wait, and a fourth is in the thread's hands.
    assert settled(lambda: len(read) == 5)
    time.sleep(0.05)
    assert len(read) == 5
    assert list(ahead) == list(range(1, 100))
    assert settled(lambda: not threads())


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_thread_ends_when_the_iterator_is_dropped(taken):
    def endless():
        while True:
            yield 0

    ahead = prefetched(endless(), 2)
    for _ in range(taken):
        next(ahead)
    assert settled(lambda: bool(threads()) == bool(taken))
    del ahead
    assert settled(lambda: not threads())


ENDLESS = """
import itertools, torch
from aksae.prefetch import prefetched
ahead = prefetched((torch.randn(300, 300) @ torch.randn(300, 300) for _ in itertools.count()), 4)
next(ahead)
print("done")
"""
# The source is closed when the thread has nothing more to read, and takes its time.
CLOSING = """
import itertools, time
from aksae.prefetch import prefetched
def source():
    try:
        yield from itertools.count()
    finally:
        time.sleep(0.5)
        print("done")
ahead = prefetched(source(), 4)
next(ahead)
del ahead
time.sleep(0.2)
"""


@pytest.mark.parametrize("code", [ENDLESS, CLOSING], ids=["computing", "closing"])
def test_the_process_ends_after_what_is_read_ahead(code):
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_error_comes_in_its_turn():
    def source():
        yield 1
        yield 2
        raise UserError("the third is broken")

    ahead = prefetched(source(), 8)
    time.sleep(0.05)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(UserError, match="the third is broken"):
        next(ahead)
    assert settled(lambda: not threads())


def test_reading_ahead_hides_a_slow_source():
    """What takes as long to read as to train on costs a step next to nothing, once the first batches are there."""

    class Slow(Rows):
        def checked(self):
            time.sleep(0.004)
            return torch.randn(self.n, D, generator=torch.Generator().manual_seed(self.first))

    class Busy(Callback):
        def on_step(self, run, group):
            time.sleep(0.012)

    shares = []

    class Shares(Callback):
        def on_log(self, run, record):
            shares.append(record["data_wait"])

    made = [Slow(i, 32) for i in range(0, 3200, 32)]
    batches = MixedBatches(made, 32, buffer_rows=64)
    fit(SAE(SAEConfig(D, 16, TopK(3))), batches, FitConfig(steps=90, log_every=30), [Busy(), Shares()])
    assert 0 <= sorted(shares)[1] < 0.2
    shares.clear()
    one_by_one = (block.checked() for block in made)
    fit(SAE(SAEConfig(D, 16, TopK(3))), one_by_one, FitConfig(steps=90, log_every=30), [Shares()])
    assert sorted(shares)[1] > 0.2


WORKER = """
import json, sys, torch
import torch.distributed as dist
from aksae.mixing import MixedBatches
sys.path.insert(0, "tests")
from test_mixing import blocks
dist.init_process_group("gloo")
batches = MixedBatches(blocks(), 5, buffer_rows=12)
batches.load_state_dict({**batches.state_dict(), "taken": int(sys.argv[2])})
drawn = [batch.x[:, 0].int().tolist() for batch, _ in zip(batches, range(12))]
open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w").write(json.dumps(drawn))
dist.destroy_process_group()
"""


def test_processes_read_shares_of_their_own_in_batches_of_one_size(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    drawn = {}
    for start in (0, 6):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        done = subprocess.run(
            [*command, str(tmp_path), str(start)], env=env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        drawn[start] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    shares = [{row for batch in batches for row in batch} for batches in drawn[0]]
    assert not shares[0] & shares[1]
    assert sorted(shares[0] | shares[1]) == list(range(50))
    assert {len(batch) for batches in drawn[0] for batch in batches} == {5}
    assert [batches[:6] for batches in drawn[6]] == [batches[6:] for batches in drawn[0]]


def test_fewer_blocks_than_processes(monkeypatch):
    from aksae import mixing

    monkeypatch.setattr(mixing, "world_size", lambda: 3)
    with pytest.raises(UserError, match="got 2 blocks of rows for 3 processes, needs at least one for each"):
        next(iter(MixedBatches([Rows(0, 5), Rows(5, 5)], 2, buffer_rows=4)))
