"""experiments/same.py: it tells equal trainings from others."""

import same


def test_equal_trainings_are_counted_together_and_others_apart(monkeypatch, capsys):
    same.main(["--runs", "2"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 of 2 end with ")
    seeds = iter("12")
    real = same.subprocess.run
    other = lambda words, **options: real([*words, "--seed", next(seeds)], **options)  # noqa: E731
    monkeypatch.setattr(same.subprocess, "run", other)
    same.main(["--runs", "2"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 of 2 end with ") and second.startswith("1 of 2 end with ")
    assert line.split()[-1] in first + second
