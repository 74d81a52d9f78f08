#!/usr/bin/env bash
# Installs, as root of a Debian or Ubuntu, SLURM for tests/test_slurm.py and OSMesa, with which
# tests/test_play.py draws without a GPU; elsewhere says so and goes on.
PATH=$PATH:/usr/sbin
type munged slurmctld slurmd sbatch >/dev/null 2>&1 && ldconfig -p | grep -q libOSMesa && exit
get() { # give up soon without a network, and never wait for a question or for another apt-get
    local quickly="-o Acquire::http::Timeout=10 -o Acquire::Retries=1 -o DPkg::Lock::Timeout=20"
    DEBIAN_FRONTEND=noninteractive timeout "$1" apt-get $quickly "${@:2}" </dev/null >/dev/null 2>&1
}
packages="--yes --no-install-recommends install slurm-wlm munge libosmesa6"
if [ "$(id -u)" = 0 ] && type apt-get >/dev/null 2>&1 && get 120 update &&
    get 240 --download-only $packages && get 240 $packages; then
    exit # in three steps, as what is cut short while it unpacks would have to be repaired
fi
echo "install_system.sh: SLURM and OSMesa could not be installed; tests will say what they miss" >&2
