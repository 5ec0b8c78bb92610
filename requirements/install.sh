#!/usr/bin/env bash
# Make .venv and install requirements/cpu.lock and this package into it, or do nothing where that is done already.
#
# Usage: requirements/install.sh            (`make venv` calls it)
#        PYTHON=/path/to/python3.11 requirements/install.sh
#
# .venv/.opsd-installed is written last and names what was installed: where it is absent, an earlier run was
# interrupted and its .venv is made anew; where it names another lock or folder, likewise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME

readonly VENV=.venv LOCK=requirements/cpu.lock
readonly OWNED=$VENV/.opsd-venv STAMP=$VENV/.opsd-installed LOG=$VENV/install.log
readonly TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Measured: 3.9 GiB installed, 1.0 GB of wheels while pip works, and the same again in pip's cache.
readonly NEEDED_MIB=6144
# The oldest C library all wheels of the lock run on (Ubuntu 22.04, Debian 12, RHEL 9).
readonly GLIBC_MINOR=34
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    if (($#)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}

check_platform() {
    local system glibc
    system="$(uname -s) $(uname -m)"
    [[ $system == "Linux x86_64" ]] || fail "the CPU environment is locked for Linux x86_64; this machine is $system." \
        "Use a Linux x86_64 machine, container or virtual machine; docs/install.md has the ways without the lock."
    if command -v getconf >/dev/null; then
        glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || glibc="another C library"
        if ! [[ $glibc =~ ^glibc\ 2\.([0-9]+) ]] || ((BASH_REMATCH[1] < GLIBC_MINOR)); then
            fail "the locked wheels need glibc 2.$GLIBC_MINOR or newer; this system has $glibc." \
                "Use Ubuntu 22.04, Debian 12, RHEL 9 or newer, or a container of one of them."
        fi
    fi
    grep -qw avx2 /proc/cpuinfo || fail "vLLM's CPU kernels need AVX2, which this processor does not report." \
        "In a virtual machine, pass the host's CPU features through (for QEMU: -cpu host)."
}

# Print the path of the first Python 3.11 found.
find_python() {
    local candidate version found=""
    local -a candidates
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    else
        mapfile -t candidates < <(type -aP python3.11 python3 python)
    fi
    for candidate in "${candidates[@]}"; do
        # Not the environment that is about to be made anew, which make (and its activation) puts on the PATH.
        if [[ $(dirname "$candidate") -ef $VENV/bin ]]; then continue; fi
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if [[ $version == 3.11 ]]; then
            printf '%s\n' "$candidate"
            return
        fi
        found+="${found:+, }$candidate is $version"
    done
    fail "Python 3.11 is needed and was not found (${PYTHON:+PYTHON=$PYTHON: }${found:-no Python that runs})." \
        "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv; or: uv python install 3.11;" \
        "or: conda create -n py311 python=3.11), or name one: PYTHON=/path/to/python3.11 make ..."
}

check_venv_module() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null || fail "$1 lacks the standard modules venv and ensurepip." \
        "Debian and Ubuntu ship them apart: apt install python3.11-venv"
}

check_disk() {
    local folder=. free_mib
    if [[ -d $VENV ]]; then folder=$VENV; fi
    free_mib=$(df -Pm "$folder" | awk 'NR == 2 {print $4}')
    ((free_mib >= NEEDED_MIB)) || fail \
        "not enough disk space: installing needs $NEEDED_MIB MiB free in $(cd "$folder" && pwd), and there are $free_mib MiB." \
        "Free some, or clone to a larger disk. (.venv may be a symbolic link to an empty folder elsewhere.)"
}

# What a complete installation looks like: the lock, the folder (a moved .venv is broken) and setup.py.
lock_line() { printf 'lock %s in %s\n' "$(sha256sum <$LOCK)" "$PWD"; }
package_line() { printf 'package %s\n' "$(sha256sum <setup.py)"; }

has_lock_installed() {
    [[ -f $STAMP ]] && [[ $(sed -n 1p $STAMP) == "$(lock_line)" ]] && $VENV/bin/python -c '' 2>/dev/null
}

# Empty .venv, if this script made it.
clear_venv() {
    if [[ -d $VENV && ! -e $OWNED && -n $(ls -A $VENV) ]]; then
        fail ".venv exists and was not made by this script, so it is left alone." "Move it away: mv .venv .venv.mine"
    fi
    mkdir -p $VENV
    if [[ -e $OWNED ]]; then
        echo "Removing the unfinished or outdated .venv"
        find $VENV/ -mindepth 1 ! -path $OWNED -delete
    fi
    touch $OWNED
}

# pip install with one line of progress; everything pip says goes to the log.
pip_install() {
    local total=$1 line count=0
    shift
    # pip's temporary folder lies in .venv, so that one disk, the one that was checked, has to have the space.
    TMPDIR=$PWD/$VENV/tmp $VENV/bin/python -m pip install --no-build-isolation --no-deps "$@" 2>&1 | tee -a $LOG |
        while IFS= read -r line; do
            case $line in
                Collecting* | Processing*)
                    count=$((count + 1))
                    line=${line#* } line=${line%% *}
                    if [[ -t 1 ]]; then
                        printf '\r  %d of %d  %-50.50s' "$count" "$total" "${line##*/}"
                    elif ((count % 40 == 0)); then
                        printf '  %d of %d downloaded\n' "$count" "$total"
                    fi
                    ;;
                "Installing collected"*)
                    if [[ -t 1 ]]; then printf '\r%-72s\r' ""; fi
                    if ((total > 1)); then echo "  all downloaded; unpacking"; fi
                    ;;
            esac
        done
}

pip_failed() {
    tail -n 15 $LOG >&2
    fail "pip could not install $1 (its last lines are above, all of them in $LOG)." "$2" \
        "Run the same command again afterwards: it starts over from pip's cache."
}

install_lock() {
    local network="Check that this machine reaches pypi.org (behind a proxy: set HTTPS_PROXY; with a mirror: PIP_INDEX_URL)."
    mkdir $VENV/tmp
    # First what builds the one source distribution (ANTLR's runtime, pure Python), pinned like everything else.
    grep '^setuptools==' $LOCK >$VENV/tmp/setuptools.txt
    grep '^torch==' $LOCK >$VENV/tmp/torch.txt
    grep -vE '^(setuptools|torch)==' $LOCK >$VENV/tmp/rest.txt
    pip_install 1 --require-hashes -r $VENV/tmp/setuptools.txt || pip_failed setuptools "$network"

    echo "[2/4] torch, CPU build (190 MB)"
    if ! pip_install 1 --require-hashes -r $VENV/tmp/torch.txt; then
        echo "  not in pip's configured index, where PyPI does not have it; taking it from $TORCH_INDEX"
        pip_install 1 --require-hashes --index-url $TORCH_INDEX -r $VENV/tmp/torch.txt ||
            pip_failed "torch's CPU build" "Check that this machine reaches $TORCH_INDEX, or put the wheel into a folder and set PIP_FIND_LINKS to it."
    fi

    local count
    count=$(grep -c == $VENV/tmp/rest.txt)
    echo "[3/4] $count packages of $LOCK (830 MB)"
    pip_install "$count" --use-pep517 --require-hashes -r $VENV/tmp/rest.txt || pip_failed "$LOCK" "$network"
    rm -r $VENV/tmp
}

main() {
    # Two makes at once in a fresh clone: the second waits here and then finds the work done.
    exec 9<"$LOCK"
    flock 9
    if has_lock_installed && [[ $(sed -n 2p $STAMP) == "$(package_line)" ]]; then return; fi
    # pip ends in its own way when interrupted, which bash alone would take for a failure to be worked around.
    trap 'printf "\ninterrupted; the next run starts over\n" >&2; exit 130' INT TERM
    SECONDS=0
    if ! has_lock_installed; then
        local python
        check_platform
        python=$(find_python)
        check_venv_module "$python"
        check_disk
        clear_venv
        echo "[1/4] .venv from $python"
        "$python" -m venv $VENV
        install_lock
    fi
    echo "[4/4] opsd_megatron, editable"
    mkdir -p $VENV/tmp
    pip_install 1 -e . || pip_failed opsd_megatron "setup.py is at fault."
    rm -r $VENV/tmp
    {
        lock_line
        package_line
    } >$STAMP.new
    mv $STAMP.new $STAMP
    echo "Installed in $SECONDS s"
}

main
