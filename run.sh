#!/usr/bin/env bash
# The lab notebook: set up, train, test, reproduce. Needs Python 3.11 or newer, nothing else.
#
#   ./run.sh                                   the main job: SAC on Humanoid-v3, m = 2
#   ./run.sh ppo.py --env Ant-v3 --quant-m 1   any other command line
#   ./run.sh test                              lint and every test
#   ./run.sh reproduce                         every run, figure and table in experiments/results
set -euo pipefail
script=$(readlink -f -- "${BASH_SOURCE[0]}") # not the symbolic link that may lead here
cd -- "${script%/*}"

# setup VENV REQUIREMENTS: install REQUIREMENTS into VENV; returns at once when that was done before.
setup() {
    local venv=$1 requirements=$2 python stamp
    stamp="$venv/${requirements//\//-}.stamp"
    if "$venv/bin/python" -c "" 2>/dev/null; then
        cat requirements.txt "$requirements" | cmp -s - "$stamp" && return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 ""; do
        [ -n "$python" ] || { echo "run.sh: Python 3.11 or newer is needed" >&2; exit 1; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    echo "run.sh: installing $requirements into $venv (minutes, once)" >&2
    # The variables are expanded now: when a trap runs, those of the function are gone.
    if [ -e "$venv" ]; then # it may have worked: never removed
        trap "echo 'run.sh: installing $requirements into $venv failed, see above' >&2" EXIT
    else
        trap "rm -rf '$venv'; echo 'run.sh: setting up $venv failed, see above; removed it' >&2" EXIT
    fi
    if ! "$venv/bin/python" -c "" 2>/dev/null; then
        rm -f "$venv"/bin/python "$venv"/bin/python3* # links to a Python that is gone
        "$python" -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cat requirements.txt "$requirements" >"$stamp"
    trap - EXIT
}

# One line per run behind experiments/results: SAC 100k steps, PPO 300k steps.
learning_runs() {
    local env seed
    for env in HalfCheetah-v3 Walker2d-v3; do
        for seed in 1 2; do
            echo "sac.py --env $env --seed $seed --total-timesteps 100000"
            echo "sac.py --env $env --seed $seed --total-timesteps 100000 --quant-m 2"
        done
    done
    echo "sac.py --env Humanoid-v3 --seed 1 --total-timesteps 100000 --quant-m 2"
    for env in HalfCheetah-v3 Walker2d-v3 Ant-v3 Humanoid-v3; do
        for seed in 1 2 3; do
            echo "ppo.py --env $env --seed $seed --total-timesteps 300000"
            echo "ppo.py --env $env --seed $seed --total-timesteps 300000 --quant-m 1"
        done
    done
}

# The Stable-Baselines3 runs that they are held against.
reference_runs() {
    local env seed sb3="experiments/peers.py --lib sb3"
    for env in HalfCheetah-v3 Walker2d-v3; do
        for seed in 1 2; do
            echo "$sb3 --algo sac --env $env --seed $seed --total-timesteps 100000"
        done
        for seed in 1 2 3; do
            echo "$sb3 --algo ppo --env $env --seed $seed --total-timesteps 300000"
        done
    done
    echo "$sb3 --algo sac --env Humanoid-v3 --seed 1 --total-timesteps 100000"
}

# Storages side by side: SAC 100k steps, whose float64 and m = 2 are learning_runs, and PPO 200k.
ablation_runs() {
    local env seed storage
    for env in HalfCheetah-v3 Walker2d-v3; do
        for seed in 1 2; do
            for storage in "--quant-m 0" "--quant-m 1" "--storage float16"; do
                echo "sac.py --env $env --seed $seed --total-timesteps 100000 $storage"
            done
        done
        for seed in 1 2 3; do
            for storage in "" " --quant-m 0" " --quant-m 1" " --quant-m 2"; do
                echo "ppo.py --env $env --seed $seed --total-timesteps 200000$storage"
            done
        done
    done
    for seed in 1 2; do # where equal s_q are most frequent
        for storage in "" " --quant-m 1" " --quant-m 2"; do
            echo "sac.py --env Ant-v3 --seed $seed --total-timesteps 100000$storage"
        done
    done
}

case "${1-}" in
test)
    setup .venv tests/requirements.txt
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/python -m pytest "${@:2}"
    ;;
reproduce)
    for folder in runs/learning runs/ablation runs/states; do
        [ ! -e $folder ] || { echo "run.sh: $folder exists; move it away first" >&2; exit 2; }
    done
    setup .venv requirements.txt
    setup .venv-bench experiments/requirements.txt
    export OMP_NUM_THREADS=1 # two runs side by side
    learning_runs | xargs -P 2 -I{} sh -c '.venv/bin/python {} --run-dir runs/learning'
    reference_runs | xargs -P 2 -I{} sh -c '.venv-bench/bin/python {} --run-dir runs/learning'
    ablation_runs | xargs -P 2 -I{} sh -c '.venv/bin/python {} --run-dir runs/ablation'
    .venv/bin/python experiments/ablation.py states --out runs/states
    .venv/bin/python experiments/ablation.py errors --states runs/states
    .venv/bin/python experiments/ablation.py speed --env Humanoid-v3 --rounds 3 --steps 1000
    .venv/bin/python experiments/plot.py collect runs/ablation --out experiments/results/ablation
    .venv/bin/python experiments/budget.py
    .venv/bin/python experiments/checkpoint.py
    .venv/bin/python experiments/soak.py
    unset OMP_NUM_THREADS
    .venv/bin/python experiments/plot.py collect runs/learning --out experiments/results
    .venv/bin/python experiments/plot.py draw --results experiments/results
    .venv/bin/python memory.py --plot experiments/results/memory.png
    .venv/bin/python experiments/speed.py --cores 2 --rounds 2
    .venv/bin/python experiments/scaling.py --rounds 2
    ;;
play)
    setup .venv requirements.txt
    exec .venv/bin/python experiments/play.py "${@:2}"
    ;;
experiments/peers.py)
    setup .venv-bench experiments/requirements.txt
    exec .venv-bench/bin/python "$@"
    ;;
"")
    setup .venv requirements.txt
    exec .venv/bin/python sac.py --env Humanoid-v3 --quant-m 2
    ;;
*)
    setup .venv requirements.txt
    exec .venv/bin/python "$@"
    ;;
esac
