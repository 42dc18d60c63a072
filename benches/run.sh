#!/usr/bin/env bash
# Every figure of the project, in one command: reading through the mount and materializing, each beside
# a native file in the same run. It needs root (dropped caches, loop devices) and about 20 GB of a real disk.
#
#   benches/run.sh                     all of it, which takes about half an hour
#   benches/run.sh --list              what is measured
#   benches/run.sh --only cold-mmap,find --samples 3
#   benches/run.sh --help              all options
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
venv=$target/test-venv # that of tests/run.sh, made in the same way

step() {
    echo "==> $*" >&2
    "$@"
}

if ! command -v cargo >/dev/null; then
    echo "benches/run.sh: Rust is missing; see https://rustup.rs" >&2
    exit 1
fi
missing=()
need() { # need PACKAGE COMMAND...
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}

need python3 command -v python3
need python3-venv python3 -c "import ensurepip, venv"
need fuse3 command -v fusermount3
need xfsprogs command -v mkfs.xfs
need btrfs-progs command -v mkfs.btrfs
need util-linux-extra command -v fincore
need time test -x /usr/bin/time
if [ ${#missing[@]} -gt 0 ]; then
    echo "benches/run.sh: missing; on Debian: apt install ${missing[*]}" >&2
    exit 1
fi

wanted=$(python3 -VV && cat tests/python/requirements.txt)
if [ "$(cat "$venv/made-from" 2>/dev/null)" != "$wanted" ]; then
    step python3 -m venv --clear "$venv"
    step "$venv/bin/pip" install --quiet --disable-pip-version-check -r tests/python/requirements.txt
    echo "$wanted" >"$venv/made-from"
fi
if [ -z "${ODMOE_FS:-}" ]; then
    step cargo build --release --bins --examples
    export ODMOE_FS=$target/release/odmoe-fs
fi
export PYTHONDONTWRITEBYTECODE=1
exec "$venv/bin/python" benches/bench.py "$@"
