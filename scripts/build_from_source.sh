#!/usr/bin/env bash
# Build PyTorch, FlashMLA and titan_peer from source into wheels/, for x86-64 or ARM (Grace) machines with NVIDIA GPUs.
#
#   scripts/build_from_source.sh [--dry-run] [--machine x86_64|aarch64]
#
#   --dry-run     print every step without running it
#   --machine     print the steps for this kind of machine (default: this one); only with --dry-run
#
# Environment:
#   PYTHON_VERSION         Python version of the wheels                             (default: 3.12)
#   CUDA_VERSION           version of the CUDA toolkit                              (default: 13.0)
#   TORCH_CUDA_ARCH_LIST   compute capabilities, separated by spaces or semicolons  (default: 9.0a)
#   TORCH_REF              tag, branch or commit of PyTorch                         (default: v2.11.0)
#   FLASH_MLA_REF          tag, branch or commit of FlashMLA                        (default: main)
#   ACL_REF                tag of the Arm Compute Library, ARM only                 (default: v52.6.0)
#   SKIP_TORCH=1           install PyTorch's released package instead of building it
#   SKIP_FLASH_MLA=1       do not build FlashMLA
#   CUDA_HOME              folder of the CUDA toolkit                               (default: /usr/local/cuda-CUDA_VERSION)
#   BUILD_DIR, WHEEL_DIR   folders of sources and of wheels                         (default: build/source, wheels)
#   MAX_JOBS               compilers that run at the same time                      (default: the number of processors)
#
# If the script was interrupted, start it again: a wheel of the same reference and settings is not built a second time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Print the comment at the top of this file.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' scripts/build_from_source.sh; }

DRY_RUN=
MACHINE=
while (($#)); do
    case $1 in
        --dry-run) DRY_RUN=1 ;;
        --machine) MACHINE=${2:-}; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown argument $1; allowed: --dry-run, --machine, --help" >&2; exit 2 ;;
    esac
    shift
done
if [[ -n ${MACHINE} && -z ${DRY_RUN} ]]; then
    echo "error: --machine ${MACHINE}: only with --dry-run; wheels are built for the machine they are built on" >&2
    exit 2
fi
MACHINE=${MACHINE:-$(uname -m)}
case ${MACHINE} in
    x86_64 | aarch64) ;;
    *) echo "error: machine ${MACHINE}: must be x86_64 or aarch64" >&2; exit 2 ;;
esac

PYTHON_VERSION=${PYTHON_VERSION:-3.12}
CUDA_VERSION=${CUDA_VERSION:-13.0}
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
TORCH_REF=${TORCH_REF:-v2.11.0}
FLASH_MLA_REF=${FLASH_MLA_REF:-main}
ACL_REF=${ACL_REF:-v52.6.0}
SKIP_TORCH=${SKIP_TORCH:-}
SKIP_FLASH_MLA=${SKIP_FLASH_MLA:-}
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda-${CUDA_VERSION}}
BUILD_DIR=${BUILD_DIR:-build/source}
WHEEL_DIR=${WHEEL_DIR:-wheels}
if [[ -n ${DRY_RUN} ]]; then MAX_JOBS=${MAX_JOBS:-N}; else MAX_JOBS=${MAX_JOBS:-$(nproc)}; fi
[[ ${SKIP_TORCH} == 0 ]] && SKIP_TORCH=
[[ ${SKIP_FLASH_MLA} == 0 ]] && SKIP_FLASH_MLA=
export TORCH_CUDA_ARCH_LIST CUDA_HOME MAX_JOBS

PYTHON=python${PYTHON_VERSION}
VENV=${BUILD_DIR}/venv-${PYTHON_VERSION}
SETTINGS=py${PYTHON_VERSION}-cuda${CUDA_VERSION}-${MACHINE}-${TORCH_CUDA_ARCH_LIST//[ ;]/_}
NEEDS_CUDA=1
[[ -n ${SKIP_TORCH} && -n ${SKIP_FLASH_MLA} ]] && NEEDS_CUDA=

step() { printf '\n== %s\n' "$*"; }

# Print a command and, unless this is a dry run, execute it; with --in DIR, in the folder DIR.
run() {
    local folder=.
    if [[ $1 == --in ]]; then folder=$2; shift 2; fi
    local where=
    [[ ${folder} == . ]] || where="(in ${folder}) "
    printf '+ %s%s\n' "${where}" "${*//"${PWD}"/\$PWD}"
    if [[ -z ${DRY_RUN} ]]; then (cd "${folder}" && "$@"); fi
}

# The absolute path of a folder.
absolute() { if [[ $1 == /* ]]; then echo "$1"; else echo "${PWD}/$1"; fi; }

# Get the sources of a repository at a reference, with submodules; an existing folder is updated to the reference.
checkout() {
    local url=$1 reference=$2 folder=$3
    if [[ -d ${folder}/.git && -z ${DRY_RUN} ]]; then
        run git -C "${folder}" fetch --tags origin "${reference}"
        run git -C "${folder}" checkout --force FETCH_HEAD
    else
        run git clone "${url}" "${folder}"
        run git -C "${folder}" checkout "${reference}"
    fi
    run git -C "${folder}" submodule update --init --recursive
}

# The file that records that the wheel NAME of REFERENCE was built with these settings.
mark() { echo "${WHEEL_DIR}/.$1-${2//\//_}-${SETTINGS}"; }

# The newest wheel NAME.
newest() {
    if [[ -n ${DRY_RUN} ]]; then echo "${WHEEL_DIR}/$1-*.whl"; return; fi
    find "${WHEEL_DIR}" -name "$1-*.whl" -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-
}

# Whether the wheel NAME of REFERENCE was built before with the same settings.
built() {
    [[ -z ${DRY_RUN} && -e $(mark "$1" "$2") ]] || return 1
    compgen -G "${WHEEL_DIR}/${1//-/_}-*.whl" >/dev/null || return 1
    echo "built before: $1 $2 (${SETTINGS})"
}

prerequisites() {
    local -a missing=()
    local tool
    need() { command -v "$1" >/dev/null 2>&1 || missing+=("$1: $2"); }
    need git "install git"
    need "${PYTHON}" "install Python ${PYTHON_VERSION}, or set PYTHON_VERSION"
    for tool in gcc g++; do need "${tool}" "install a C++17 compiler"; done
    if [[ -z ${SKIP_TORCH} ]]; then
        need cmake "install CMake 3.27 or later"
        need ninja "install Ninja"
        [[ ${MACHINE} == aarch64 ]] && need scons "install SCons, which builds the Arm Compute Library"
    fi
    if [[ -n ${NEEDS_CUDA} ]]; then
        if [[ ! -x ${CUDA_HOME}/bin/nvcc ]]; then
            missing+=("nvcc: no compiler in CUDA_HOME = ${CUDA_HOME}; install the CUDA toolkit ${CUDA_VERSION}, or set CUDA_HOME")
        elif ! "${CUDA_HOME}/bin/nvcc" --version | grep -q "release ${CUDA_VERSION}"; then
            missing+=("nvcc: ${CUDA_HOME}/bin/nvcc is not of CUDA_VERSION = ${CUDA_VERSION}")
        fi
    fi
    if command -v "${PYTHON}" >/dev/null 2>&1; then
        "${PYTHON}" -c 'import venv, ensurepip' 2>/dev/null || missing+=("venv: install the venv module of ${PYTHON}")
        "${PYTHON}" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
            missing+=("Python.h: install the headers of ${PYTHON}")
    fi
    if ((${#missing[@]})); then
        echo "error: missing, ${#missing[@]} in all:" >&2
        printf '  %s\n' "${missing[@]}" >&2
        exit 2
    fi
}

echo "plan: ${MACHINE}, Python ${PYTHON_VERSION}, CUDA ${CUDA_VERSION}, compute capabilities ${TORCH_CUDA_ARCH_LIST}"
[[ -n ${DRY_RUN} ]] || prerequisites

step "environment"
run mkdir -p "${BUILD_DIR}" "${WHEEL_DIR}"
[[ -z ${DRY_RUN} && -x ${VENV}/bin/python ]] || run "${PYTHON}" -m venv "${VENV}"
PYTHON=$(absolute "${VENV}")/bin/python
WHEELS=$(absolute "${WHEEL_DIR}")
run "${PYTHON}" -m pip install --upgrade pip "setuptools>=77" wheel ninja numpy packaging

if [[ -n ${SKIP_TORCH} ]]; then
    step "PyTorch, as released"
    run "${PYTHON}" -m pip install "torch>=2.11,<2.14"
elif ! built torch "${TORCH_REF}"; then
    TORCH=${BUILD_DIR}/pytorch
    options=(USE_CUDA=1 USE_CUDNN=1 USE_NCCL=1 USE_DISTRIBUTED=1 BUILD_TEST=0 "CUDA_HOME=${CUDA_HOME}"
        "TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST}" "MAX_JOBS=${MAX_JOBS}")
    if [[ ${TORCH_REF} == v[0-9]* ]]; then options+=("PYTORCH_BUILD_VERSION=${TORCH_REF#v}" PYTORCH_BUILD_NUMBER=1); fi
    if [[ ${MACHINE} == aarch64 ]]; then
        step "Arm Compute Library ${ACL_REF}"
        ACL=${BUILD_DIR}/acl
        checkout https://github.com/ARM-software/ComputeLibrary.git "${ACL_REF}" "${ACL}"
        run --in "${ACL}" scons "-j${MAX_JOBS}" Werror=0 debug=0 neon=1 opencl=0 embed_kernels=0 os=linux arch=armv8a \
            build=native multi_isa=1 fixed_format_kernels=1 openmp=1 cppthreads=0
        options+=(USE_MKLDNN=1 USE_MKLDNN_ACL=1 "ACL_ROOT_DIR=$(absolute "${ACL}")")
    fi
    step "PyTorch ${TORCH_REF}"
    checkout https://github.com/pytorch/pytorch.git "${TORCH_REF}" "${TORCH}"
    run --in "${TORCH}" "${PYTHON}" -m pip install -r requirements.txt
    if [[ ${MACHINE} == x86_64 ]]; then run "${PYTHON}" -m pip install mkl-static mkl-include; fi
    run --in "${TORCH}" env "${options[@]}" "${PYTHON}" -m pip wheel . --no-build-isolation --no-deps -w "${WHEELS}"
    run touch "$(mark torch "${TORCH_REF}")"
fi
if [[ -z ${SKIP_TORCH} ]]; then
    step "install the PyTorch that was built"
    run "${PYTHON}" -m pip install "$(newest torch)"
fi

if [[ -z ${SKIP_FLASH_MLA} ]] && ! built flash-mla "${FLASH_MLA_REF}"; then
    step "FlashMLA ${FLASH_MLA_REF}"
    FLASH_MLA=${BUILD_DIR}/flash-mla
    checkout https://github.com/deepseek-ai/FlashMLA.git "${FLASH_MLA_REF}" "${FLASH_MLA}"
    options=("CUDA_HOME=${CUDA_HOME}" "MAX_JOBS=${MAX_JOBS}")
    # its kernels are for Hopper (9.0a) and Blackwell (10.0a); each set is built only if TORCH_CUDA_ARCH_LIST names it
    [[ ${TORCH_CUDA_ARCH_LIST} == *10.* ]] || options+=(FLASH_MLA_DISABLE_SM100=1)
    [[ ${TORCH_CUDA_ARCH_LIST} == *9.0* ]] || options+=(FLASH_MLA_DISABLE_SM90=1)
    run --in "${FLASH_MLA}" env "${options[@]}" "${PYTHON}" -m pip wheel . --no-build-isolation --no-deps -w "${WHEELS}"
    run touch "$(mark flash-mla "${FLASH_MLA_REF}")"
fi

step "titan_peer"
run "${PYTHON}" -m pip wheel . --no-build-isolation --no-deps -w "${WHEELS}"

step "done"
echo "install: pip install ${WHEEL_DIR}/*.whl"
