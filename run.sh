#!/usr/bin/env bash
# The lab notebook: set up, train, test, every figure. Needs Python 3.11 or newer, nothing else.
#
#   ./run.sh                                   the main job: SAC on Humanoid-v3, m = 2
#   ./run.sh ppo.py --env Ant-v3 --quant-m 1   any other command line
#   ./run.sh test                              lint and every test
#   ./run.sh play runs/NAME --video walk.mp4   what a run has learned
#   ./run.sh compare runs/A runs/B             curves, and a table of differences
#
#   ./run.sh fig2 | fig3 | fig4 | table1 | ablate-m | ablate-storage
#                                              trains what is not finished yet, then draws
#   ./run.sh fig4 --list                       what it would train, one command per line
#   ./run.sh fig4 --draw                       draws what has been trained so far
#   SEEDS="1 2" STEPS=300000 TASKS=Ant-v3 ALGOS=ppo JOBS=2 ./run.sh fig4         a part of it
#   sbatch --array=0-159 run.sh fig4           on a cluster: docs/cluster.md
#   ./run.sh reproduce                         all of experiments/results, in days
#   ./run.sh help                              this page
#SBATCH --requeue --open-mode=append
set -euo pipefail
script=$(readlink -f -- "${BASH_SOURCE[0]}") # not the symbolic link that may lead here
if [[ $script == */slurm_script ]]; then         # sbatch runs a copy: ask for the original's path
    cd -- "$SLURM_SUBMIT_DIR"
    line=$(squeue --noheader --job "$SLURM_JOB_ID" --format %o) # it and its arguments
    line=${line%%$'\n'*}                                        # the same for all of an array
    script=$(readlink -f -- "${line%" $*"}")
fi
cd -- "${script%/*}"

# refuse WHY: one line about bad input.
refuse() { echo "run.sh: $1" >&2; exit 2; }

# setup VENV REQUIREMENTS: install REQUIREMENTS into VENV; returns at once when that was done before.
setup() {
    local venv=$1 requirements=$2 python stamp locked=
    stamp="$venv/${requirements//\//-}.stamp"
    is_set_up "$venv" "$requirements" "$stamp" && return
    exec 9>"$venv.lock" # the jobs of a cluster begin all at once: one of them installs
    flock 9 && locked=yes # or all do, on a file system without locks
    is_set_up "$venv" "$requirements" "$stamp" && exec 9>&- && return
    for python in python3 python3.14 python3.13 python3.12 python3.11 ""; do
        [ -n "$python" ] || { echo "run.sh: Python 3.11 or newer is needed" >&2; exit 1; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    echo "run.sh: installing $requirements into $venv (minutes, once)" >&2
    # The variables are expanded now: when a trap runs, those of the function are gone.
    if [ -e "$venv" ] || [ -z "$locked" ]; then # it may have worked, or be another's: never removed
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
    exec 9>&-
}

# is_set_up VENV REQUIREMENTS STAMP: whether Python works there and REQUIREMENTS are as they were.
is_set_up() { "$1/bin/python" -c "" 2>/dev/null && cat requirements.txt "$2" | cmp -s - "$3"; }

# --- The figures: each list prints command lines, one per line, ready to paste --------------------

# train ALGO TASK SEED FLAGS: one run. All are in one folder: what two figures show is trained once.
train() {
    local steps=500000
    [ "$1" = sac ] || steps=1000000
    steps=${STEPS:-$steps}
    echo "./run.sh $1.py --env $2 --seed $3 --total-timesteps $steps" \
        "--checkpoint-every $(((steps + 9) / 10)) --run-dir runs/paper${4:+ $4}"
}

# each DEFAULT_SEEDS FLAGS...: every algorithm on every task with each of the FLAGS, seed by seed.
# FLAGS "m=paper" are what the paper takes: m = 1 for PPO, m = 2 for SAC.
each() {
    local seeds=${SEEDS:-$1} seed task algo flags
    shift
    for seed in $seeds; do
        for task in ${TASKS:-$paper_tasks}; do
            for algo in ${ALGOS:-ppo sac}; do
                for flags in "$@"; do
                    case "$algo $flags" in
                    "ppo m=paper") flags="--quant-m 1" ;;
                    "sac m=paper") flags="--quant-m 2" ;;
                    esac
                    train "$algo" "$task" "$seed" "$flags"
                done
            done
        done
    done
}

# quoted WORD: as it is typed, where it has spaces.
quoted() { printf %q "$1"; }

paper_tasks="HalfCheetah-v3 Walker2d-v3 Ant-v3 Humanoid-v3"

fig2() { echo "./run.sh memory.py --plot $(quoted "$OUT/fig2.png")"; }

# 3 GB; 750 MB, rounded and not; 300 MB, rounded and not.
fig3() {
    local seed task flags
    for seed in ${SEEDS:-1 2 3}; do
        for task in ${TASKS:-Humanoid-v3}; do
            for flags in "" "--quant-m 2" "--buffer-size 250000" \
                "--buffer-size 400000 --quant-m 2" "--buffer-size 100000"; do
                train sac "$task" "$seed" "$flags"
            done
        done
    done
}

fig4() { each "1 2 3 4 5 6 7 8 9 10" "" m=paper; }

# Stable-Baselines3, which fig4 draws where it has been trained; its PPO with rounding, too.
sb3() {
    local peers="experiments/peers.py --lib sb3 --algo"
    each "1 2 3" "" m=paper | sed -E "/sac\.py.*--quant-m/d" |
        sed -E "s|(ppo\|sac)\.py|$peers \1|; s| --checkpoint-every [0-9]+||"
}

ablate-m() { each "1 2" "" "--quant-m 0" "--quant-m 1" "--quant-m 2"; }

ablate-storage() {
    each "1 2" "" m=paper "--storage float32" "--storage float16" "--storage bfloat16" \
        "--storage float8_e4m3fn"
}

# Eight cells in turns, and in each float64 and rounded: a machine that drifts slows both.
table1() {
    local task algo cells=
    for algo in ${ALGOS:-ppo sac}; do
        for task in ${TASKS:-$paper_tasks}; do cells+=" $algo-64-$task"; done
    done
    echo "./run.sh experiments/speed.py --cells$cells --variants float64 rounded" \
        "--rounds ${ROUNDS:-5} --resume --out $(quoted "$OUT/table1.csv")"
}

# refuse_variables: one line about a variable that makes no sense.
refuse_variables() {
    local name
    for name in STEPS JOBS ROUNDS; do
        [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || refuse "$name=\"${!name}\" is no number from 1 on"
    done
    [[ ${SEEDS-} =~ ^\ *((0|[1-9][0-9]*)(\ +|$))*$ ]] ||
        refuse "SEEDS=\"$SEEDS\" is no list of numbers"
    for name in ${ALGOS-}; do
        [[ $name =~ ^(ppo|sac)$ ]] || refuse "ALGOS: $name is neither ppo nor sac"
    done
}

# make FIGURE: train what it shows and draw it into OUT. --list and --draw do only one of both.
make() {
    local lines count
    OUT=${OUT:-runs/$1}
    refuse_variables
    lines=$("$1")
    case "${2-}" in
    "" | --draw) ;;
    --list) echo "$lines" && return ;;
    *) refuse "$1 takes --list, --draw or nothing, not $2" ;;
    esac
    setup .venv requirements.txt
    [ "${2-}" != --draw ] || draw "$1" "$lines"
    [ "$1" != sb3 ] || setup .venv-bench experiments/requirements.txt
    if [ -n "${SLURM_ARRAY_TASK_ID-}" ]; then # just one line: the array's tasks count from 0
        count=$(wc -l <<<"$lines")
        [ "$SLURM_ARRAY_TASK_ID" -lt "$count" ] ||
            refuse "$1 has $count lines, so use --array=0-$((count - 1))"
        lines=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" <<<"$lines")
        exec .venv/bin/python experiments/jobs.py --exec <<<"$lines"
    fi
    exec .venv/bin/python experiments/jobs.py ${JOBS:+--jobs "$JOBS"} --then ./run.sh "$1" --draw \
        <<<"$lines"
}

# draw FIGURE LINES: from what these lines have trained so far.
draw() {
    case $1 in
    fig2 | sb3) exit 0 ;; # drawn by its only line; drawn by fig4
    table1) exec .venv/bin/python experiments/speed.py --draw --out "$OUT/table1.csv" ;;
    fig3 | ablate-*) exec .venv/bin/python experiments/figures.py "$1" --out "$OUT" <<<"$2" ;;
    fig4)
        lines=$(sb3)
        exec .venv/bin/python experiments/figures.py fig4 --out "$OUT" <<<"$2"$'\n'"$lines"
        ;;
    esac
}

# attempt COMMAND...: run it; if it fails, go on and remember that, unless a signal has stopped it.
attempt() {
    "$@" && return
    local code=$?
    [ "$code" -lt 128 ] || exit "$code"
    failed=1
}

# reproduce: all of experiments/results.
reproduce() {
    local results=experiments/results python=.venv/bin/python failed=0 figure seed
    refuse_variables
    setup .venv requirements.txt
    attempt env OUT=$results ./run.sh fig2
    for figure in fig3 sb3 fig4 ablate-m ablate-storage table1; do # fig4 shows sb3
        attempt env OUT="$results/$figure" ./run.sh "$figure"
    done
    export OMP_NUM_THREADS=1
    read -r seed _ <<<"${SEEDS:-1}" # the first one
    attempt $python experiments/ablation.py errors --out $results/ablation \
        runs/paper/*__sac__seed-"$seed" runs/paper/*__sac__quant-m-[012]__seed-"$seed"
    attempt $python experiments/speed.py --rounds "${ROUNDS:-3}" --cells sac-64-Humanoid-v3 \
        --variants float64 float32 float16 bfloat16 float8_e4m3fn m=0 m=1 m=2 m=3 \
        --out $results/storages.csv
    attempt $python experiments/budget.py --out $results/budget.csv
    attempt $python experiments/checkpoint.py --out $results/checkpoint.csv
    attempt $python experiments/soak.py --out $results/soak.csv \
        ${STEPS:+--steps "$STEPS" --every $(((STEPS + 9) / 10))}
    unset OMP_NUM_THREADS
    attempt $python experiments/speed.py --cores 2 --rounds "${ROUNDS:-5}" --out $results/speed.csv
    attempt $python experiments/scaling.py --rounds "${ROUNDS:-2}" --out $results/scaling.csv
    exit $failed
}

case "${1-}" in
help | --help | -h)
    sed -n '2,/^#SBATCH/ { /^#SBATCH/! s/^# \{0,1\}//p }' "$script" # the head of this file
    ;;
test)
    setup .venv tests/requirements.txt # with all of requirements.txt
    # As `setup .venv requirements.txt` would write it, which then has nothing to install.
    cat requirements.txt requirements.txt >.venv/requirements.txt.stamp
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    # All of it on several cores; with arguments plain pytest, which prints, and takes --pdb.
    [ $# -gt 1 ] || set -- test --numprocesses auto --maxprocesses 4 --dist worksteal
    .venv/bin/python -m pytest "${@:2}"
    ;;
fig2 | fig3 | fig4 | sb3 | table1 | ablate-m | ablate-storage)
    make "$@"
    ;;
compare)
    setup .venv requirements.txt
    exec .venv/bin/python experiments/compare.py "${@:2}"
    ;;
reproduce)
    reproduce
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
    [ -e "$1" ] || [[ $1 == -* ]] ||
        refuse "$1 is neither a command (see ./run.sh help) nor a file"
    setup .venv requirements.txt
    exec .venv/bin/python "$@"
    ;;
esac
