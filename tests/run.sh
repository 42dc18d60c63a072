#!/usr/bin/env bash
# Every check of the project, in one command.
#
#   tests/run.sh                    all of it
#   tests/run.sh long               all of it, with the long forms: more kills, more mounts, an hour of use
#   tests/run.sh rust               formatting, lints, documentation, Rust tests, builds
#   tests/run.sh fuzz [SECONDS]     the fuzzers, each for so long
#   tests/run.sh soak [SECONDS]     everything at once, an hour long
#   tests/run.sh python [ARGS...]   the tests on real mounts, which need the builds; ARGS go to pytest, such as -k NAME
#
# What a machine lacks the tools for is left out, and the last lines say so. With ODMOE_FS_COMPLETE=1 it is an error, if it
# is more than the target of macOS, which rustup may be unable to fetch.
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

# The library by itself: nothing of the command line comes with it.
library() {
    local tree only
    step cargo check --lib --no-default-features
    tree=$(cargo tree --no-default-features --edges normal --prefix none --format '{p}')
    for only in $(sed -n 's/^    "dep:\(.*\)",$/\1/p' Cargo.toml); do
        if grep "^$only " <<<"$tree" >&2; then
            echo "tests/run.sh: the library depends on $only, which only the command line needs" >&2
            return 1
        fi
    done
}

left_out=()

lacks() { # lacks TOOL, WHAT IS LEFT OUT
    cargo "$1" --version >/dev/null 2>&1 && return 1
    if [ -n "${ODMOE_FS_COMPLETE:-}" ]; then
        echo "tests/run.sh: cargo-$1 is missing; cargo install cargo-$1" >&2
        exit 1
    fi
    left_out+=("$2, which needs cargo-$1 (cargo install cargo-$1)")
}

say_what_was_left_out() {
    for what in "${left_out[@]}"; do echo "==> $what" >&2; done
}

rust() {
    step cargo fmt --check
    step cargo clippy --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" step cargo doc --no-deps
    # Of the examples, which are linted above and built for use below, the tests run one.
    step cargo build --example sparse_gguf
    step cargo test --lib --bins --tests
    step cargo test --doc
    library
    licences
    macos
    step cargo build --release --bins --examples
}

licences() {
    lacks deny "NOT CHECKED: licences and sources of the dependencies" && return
    step cargo fetch --quiet # also what other systems need
    step cargo deny --offline check licenses sources bans
}

macos() {
    if ! [ -d "$(rustc --print target-libdir --target $mac)" ] && ! rustup target add $mac; then
        left_out+=("NOT CHECKED: macOS, which needs the target $mac (rustup target add $mac)")
        return
    fi
    step cargo check --target $mac --features macos
}

venv=$target/test-venv

venv() { # venv [long]
    local wanted requirements=(tests/python/requirements.txt)
    if [ "${1:-}" = long ]; then requirements+=(tests/python/requirements-long.txt); fi
    need command -v python3 -- python3 python3
    need python3 -c "import ensurepip, venv" -- "Python's venv module" python3-venv
    need command -v fusermount3 -- fusermount3 fuse3
    need command -v nginx -- nginx nginx-light
    need command -v openssl -- openssl openssl
    if [ "$(id -u)" = 0 ]; then # only root can mount what these make
        need command -v mkfs.xfs -- mkfs.xfs xfsprogs
        need command -v mkfs.btrfs -- mkfs.btrfs btrfs-progs
        need command -v mkfs.exfat -- mkfs.exfat exfatprogs
        need command -v mount.exfat-fuse -- mount.exfat-fuse exfat-fuse
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
    local pytest=("$venv/bin/python" -m pytest)
    case "$*" in
    "" | --long) ;;
    *)
        step "${pytest[@]}" tests/python "$@"
        return
        ;;
    esac
    # The tests of models elsewhere and of the life of mounts mostly wait, so they run beside the others: as a job of
    # their own, since other background commands of a script ignore Ctrl-C, and so would what they test.
    local waiting=(tests/python/test_{remote*,interrupted,lifecycle,progress,status,top,unmount,verify_errors}.py)
    local said=$target/waiting.txt beside failed=0
    set -m
    "${pytest[@]}" "${waiting[@]}" "$@" >"$said" 2>&1 </dev/null &
    beside=$!
    set +m
    trap "kill $beside 2>/dev/null || true" EXIT
    step "${pytest[@]}" tests/python "${waiting[@]/#/--ignore=}" "$@" || failed=$?
    echo "==> ${pytest[*]} ${waiting[*]} $*" >&2
    wait "$beside" || failed=$?
    trap - EXIT
    cat "$said"
    return "$failed"
}

soak() { # soak SECONDS
    step "$venv/bin/python" tests/python/soak.py "$1"
}

fuzz() { # fuzz SECONDS
    lacks fuzz "NOT FUZZED" && return
    step cargo run --quiet --example seeds -- fuzz/corpus
    for name in gguf model slices codec; do
        # The coverage that fuzzers go by is an unstable option of a compiler that is otherwise the stable one.
        # No sanitizer: there is no unsafe code on these ways but the choice of AVX2.
        RUSTC_BOOTSTRAP=1 step cargo fuzz run --sanitizer none "$name" -- -max_len=16384 -timeout=20 -verbosity=0 \
            -print_final_stats=1 -max_total_time="$1"
    done
}

case "${1:-all}" in
all)
    rust
    fuzz 10
    python
    soak 60
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
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
say_what_was_left_out
