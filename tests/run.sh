#!/usr/bin/env bash
# Every check of the project, in one command.
#
#   tests/run.sh                    all of it
#   tests/run.sh long               all of it, with the long forms: more kills, more mounts, an hour of use
#   tests/run.sh rust               formatting, lints, documentation, Rust tests, builds
#   tests/run.sh fuzz [SECONDS]     the fuzzers, each for so long, where a nightly toolchain is there
#   tests/run.sh soak [SECONDS]     everything at once, an hour long
#   tests/run.sh python [ARGS...]   the tests on real mounts, which need the builds; ARGS go to pytest, such as -k NAME
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
mac=aarch64-apple-darwin

step() {
    echo "==> $*" >&2
    "$@"
}

need() { # need COMMAND... -- WHAT, PACKAGE
    local check=()
    while [ "$1" != -- ]; do check+=("$1") && shift; done
    "${check[@]}" >/dev/null 2>&1 && return
    echo "tests/run.sh: $2 is missing; on Debian: apt install $3" >&2
    exit 1
}

rust() {
    step cargo fmt --check
    step cargo clippy --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" step cargo doc --no-deps
    step cargo test
    if command -v cargo-deny >/dev/null; then
        step cargo fetch --quiet # also what other systems need
        step cargo deny --offline check licenses sources bans
    else
        echo "==> NOT CHECKED: licences and sources of the dependencies, since cargo-deny is not installed" >&2
    fi
    if [ -d "$(rustc --print target-libdir --target $mac)" ] || rustup target add $mac; then
        step cargo check --target $mac --features macos
    else
        echo "==> NOT CHECKED: macOS, whose target $mac cannot be installed here" >&2
    fi
    step cargo build --release --bins --examples
}

venv=$target/test-venv

venv() { # venv [long]
    local wanted requirements=(tests/python/requirements.txt)
    if [ "${1:-}" = long ]; then requirements+=(tests/python/requirements-long.txt); fi
    need command -v python3 -- python3 python3
    need python3 -c "import ensurepip, venv" -- "Python's venv module" python3-venv
    need command -v fusermount3 -- fusermount3 fuse3
    if [ "$(id -u)" = 0 ]; then # only root can mount what these make
        need command -v mkfs.xfs -- mkfs.xfs xfsprogs
        need command -v mkfs.btrfs -- mkfs.btrfs btrfs-progs
    fi
    # Made anew only when the interpreter or the requirements change.
    wanted=$(python3 -VV && cat "${requirements[@]}")
    if [ "$(cat "$venv/made-from" 2>/dev/null)" != "$wanted" ]; then
        step python3 -m venv --clear "$venv"
        step "$venv/bin/pip" install --quiet --disable-pip-version-check "${requirements[@]/#/-r}"
        echo "$wanted" >"$venv/made-from"
    fi
    export PYTHONDONTWRITEBYTECODE=1 ODMOE_FS=${ODMOE_FS:-$target/release/odmoe-fs}
}

python() {
    case " $* " in *" --long "*) venv long ;; *) venv ;; esac
    step "$venv/bin/python" -m pytest tests/python "$@"
}

soak() { # soak SECONDS
    step "$venv/bin/python" tests/python/soak.py "$1"
}

fuzz() { # fuzz SECONDS
    if ! cargo +nightly --version >/dev/null 2>&1 || ! command -v cargo-fuzz >/dev/null; then
        echo "==> NOT FUZZED: that needs a nightly toolchain and cargo-fuzz (cargo install cargo-fuzz)" >&2
        return
    fi
    step cargo run --quiet --example seeds -- fuzz/corpus
    for name in gguf model slices codec; do
        # No sanitizer: there is no unsafe code on these ways, but for the choice of AVX2.
        step cargo +nightly fuzz run --sanitizer none "$name" -- -max_len=16384 -timeout=20 -verbosity=0 \
            -print_final_stats=1 -max_total_time="$1"
    done
}

case "${1:-all}" in
all)
    rust
    fuzz 15
    python
    soak 120
    ;;
long)
    rust
    fuzz 600
    python --long
    soak 3600
    ;;
soak)
    venv
    soak "${2:-3600}"
    ;;
fuzz) fuzz "${2:-60}" ;;
rust) rust ;;
python)
    shift
    python "$@"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
