"""support/arguments.py: ranges, the run's name, the command line that resumes, and differences."""

import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo
import sac
from support.arguments import (
    MAY_DIFFER,
    RANGES,
    check_ranges,
    command_line,
    differences,
    run_name,
)

SCRIPTS = {"sac": sac, "ppo": ppo}
both = pytest.mark.parametrize("name", SCRIPTS)


@both
def test_the_ends_of_every_range_are_allowed_and_what_is_beyond_is_refused(name):
    Args = SCRIPTS[name].Args
    check_ranges(Args())
    for field in {field.name for field in fields(Args)} & RANGES.keys():
        low, high = RANGES[field]
        check_ranges(Args(**{field: low}))
        check_ranges(Args(**{field: high}))
        for value in (low - 1, high + 1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="is out of range; it must be from") as error:
                check_ranges(Args(**{field: value}))
            assert str(error.value).startswith(f"--{field.replace('_', '-')} {value} is")


def test_every_range_is_of_a_field():
    assert RANGES.keys() <= {field.name for args in (sac.Args, ppo.Args) for field in fields(args)}


@both
def test_the_name_tells_every_learning_argument_that_differs(name):
    Args = SCRIPTS[name].Args
    assert run_name(f"{name}.py", Args()) == f"Humanoid-v3__{name}__seed-1"
    args = Args(env="mine:Ant/v0", seed=4, quant_m=1, gamma=0.9, eager=True, total_timesteps=7)
    args = replace(args, device="cuda", run_dir="x", checkpoint_every=5, eval_episodes=0)
    changed = "quant-m-1__eager-True__gamma-0.9"
    assert run_name(f"{name}.py", args) == f"mine:Ant-v0__{name}__{changed}__seed-4"


@dataclass
class Hacked(sac.Args):
    """A field of one's own needs no registration."""

    n_step_returns: int = 1


def test_a_new_field_is_in_the_name_the_command_and_the_comparison():
    args = Hacked(n_step_returns=3)
    check_ranges(args)
    assert run_name("sac.py", args) == "Humanoid-v3__sac__n-step-returns-3__seed-1"
    assert command_line("sac.py", args).endswith("sac.py --n-step-returns 3")
    assert differences(asdict(args), asdict(Hacked())) == [
        "--n-step-returns was 3 there and is 1 here"
    ]
    said = "--n-step-returns was {} there and is {} here"
    assert differences(asdict(args), asdict(sac.Args())) == [said.format(3, "no flag")]
    assert differences(asdict(sac.Args()), asdict(args)) == [said.format("no flag", 3)]


@both
def test_all_arguments_are_compared_but_those_that_may_differ(name):
    args = asdict(SCRIPTS[name].Args())
    assert differences(args, args) == []
    for field in args:
        found = differences(args | {field: "other"}, args)
        expected = f"--{field.replace('_', '-')} was other there and is {args[field]} here"
        assert found == ([] if field in MAY_DIFFER else [expected])
    assert "eager" not in MAY_DIFFER


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1)
TEXTS = TEXTS.filter(lambda text: text != "None")  # tyro takes that for None
CHANGES = {
    "env": TEXTS,
    "run_dir": TEXTS,
    "run_name": st.none()
    | TEXTS
    | st.sampled_from(["-x", "--env", "--hidden=3", "-1", "a b", "-"]),
    "quant_m": st.none() | st.integers(0, 9),
    "quant_b": st.floats(1, 1e9),
    "storage": st.sampled_from([None, "float16", "float8_e4m3fn"]),
    "pack": st.booleans(),
    "eager": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "learning_rate": st.floats(0, 1),
    "checkpoint_every": st.integers(0, 10**12),
}
OWN_CHANGES = {
    "sac": {
        "target_entropy": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "memory_budget": st.none() | st.sampled_from(["750MB", "1 GB"]),
    },
    "ppo": {"ent_coef": st.floats(0, 1e12), "n_steps": st.integers(1, 10**12)},
}


@both
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_the_command_line_gives_the_arguments_back(name, data):
    changes = data.draw(st.fixed_dictionaries({}, optional=CHANGES | OWN_CHANGES[name]))
    Args, script = SCRIPTS[name].Args, f"{name}.py"
    args = Args(**changes)
    resumed = command_line(script, args, resume=True)
    for line, expected in (
        (command_line(script, args), args),
        (resumed, Args(**{**changes, "resume": True})),
    ):
        python, named, *words = shlex.split(line)
        assert (python, named) == (sys.executable, script)
        assert tyro.cli(Args, args=words) == expected
