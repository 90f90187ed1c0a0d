"""The benchmark runs, checks before it times, and keeps what it printed."""

from __future__ import annotations

import json

from benchmarks import run
from benchmarks.cases import OURS, Case

ARGUMENTS = ["--shape", "8", "24", "96", "--rounds", "2"]


def test_every_case_is_checked_and_timed(tmp_path, capsys):
    path = tmp_path / "new" / "cpu.json"
    assert run.main([*ARGUMENTS, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["machine"].keys() >= {"CPU", "threads", "torch", "commit"}
    assert len(result["rows"]) == 13
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert row["case"] in printed
        assert row["ratio_of_medians"]
        for times in row["seconds"].values():
            assert 0 < times["p20"] <= times["p50"] <= times["p80"]


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    def wrong():
        raise AssertionError("off by one")

    called = []
    case = Case("broken", "1", {OURS: lambda: called.append(1)}, wrong)
    monkeypatch.setattr(run, "cpu_cases", lambda shape: [case])
    assert run.main(ARGUMENTS) == 1
    assert "not timed, its result is wrong: off by one" in capsys.readouterr().out
    assert not called
