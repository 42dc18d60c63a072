#!/usr/bin/env bash
# Builds the Debian package into target/debian: `cargo install cargo-deb`, then this. With ODMOE_FS_BUILT=1 it packs the
# binary that is there.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
binary=$target/release/odmoe-fs
made=$target/packaging

[ -n "${ODMOE_FS_BUILT:-}" ] || cargo build --release --bin odmoe-fs
rm -rf "$made"
mkdir -p "$made"
"$binary" man --all "$made/man"
gzip -9n "$made"/man/*.1
"$binary" completions bash >"$made/odmoe-fs.bash"
"$binary" completions zsh >"$made/_odmoe-fs"
"$binary" completions fish >"$made/odmoe-fs.fish"
# mount(8) runs this for `-t fuse.odmoe`.
ln -s /usr/bin/odmoe-fs "$made/mount.fuse.odmoe"
cargo deb --no-build --quiet "$@"
