"""What is looked at is what is used: while others exchange names of a tree for links, pipes and folders, nothing is followed,
nothing is waited for, and nothing is written elsewhere."""

import contextlib
import json
import os

import pytest

from exchange import exchanging
from odmoe import contents, expert_gguf, files_of, needs_root, odmoe, promises, succeed
from test_file_systems import held_before_it_writes

EXPERT = "experts/layer_00_expert_001.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return expert_gguf(tmp_path_factory.mktemp("model"), experts=3, rows=256)


# --- the target -----------------------------------------------------------------------------------------------------


@needs_root
@promises("A folder of the target that is, or becomes, a link is never written through.")
@pytest.mark.parametrize("is_there", [True, False])
def test_a_target_that_becomes_a_link_once_it_was_planned_is_not_written_through(tmp_path, model, is_there):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if is_there:
        out.mkdir()
    with held_before_it_writes("materialize", model, out) as process:
        if is_there:
            out.rename(tmp_path / "moved")
        out.symlink_to(elsewhere)
    assert process.returncode == 1
    assert f'"{out}" was moved or replaced' in process.said or f'"{out}" is a link' in process.said, process.said
    assert os.listdir(elsewhere) == []


@promises("A folder of the target that is, or becomes, a link is never written through.")
@pytest.mark.parametrize("name", [".", "experts", "base_model"])
def test_the_files_of_a_run_never_go_to_two_places(tmp_path, model, times, name):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    for number in range(times(15, long=300)):
        out = tmp_path / f"out{number}"
        (out / name).mkdir(parents=True)
        elsewhere.mkdir()
        link.symlink_to(elsewhere)
        with exchanging(out / name, link):
            done = odmoe("materialize", model, out)
        # The target itself may be a link when the run begins; then that is where it leads.
        places = [path for path in (out, elsewhere) if files_of(path)]
        assert len(places) <= (1 if name == "." else 2)
        if name != ".":
            assert files_of(elsewhere) == {}
        assert done.returncode in (0, 1)
        if done.returncode == 0:
            assert json.loads(succeed("verify", model, *places, "--json"))["identical"]
        for path in files_of(elsewhere).values():
            path.unlink()
        for folder in ("experts", "base_model", "."):
            with contextlib.suppress(FileNotFoundError):
                (elsewhere / folder).rmdir()
        link.unlink()


# --- what is in it --------------------------------------------------------------------------------------------------


def others(folder, victim):
    """Names of what may be put in the place of a file."""
    (folder / "a link").symlink_to(victim)
    os.mkfifo(folder / "a pipe")
    (folder / "a folder").mkdir()
    return [folder / name for name in ("a link", "a pipe", "a folder")]


@promises("In a target or a tree only regular files are opened; no link is followed, and no pipe is waited for.")
@pytest.mark.parametrize("name", [EXPERT, "experts/registry.json", "base_model/metadata.json", "base_model/metadata.gguf"])
@pytest.mark.parametrize(
    "command", [["verify"], ["materialize"], ["materialize", "--force"], ["materialize", "--layers", "0", "--experts", "0"]], ids=" ".join
)
def test_what_a_file_is_exchanged_for_is_neither_followed_nor_waited_for(tmp_path, model, times, name, command):
    out, aside, victim = tmp_path / "out", tmp_path / "aside", tmp_path / "victim"
    aside.mkdir()
    succeed("materialize", model, out)
    whole = contents(out)
    victim.write_bytes(whole[name])
    instead = others(aside, victim)
    statuses = set()
    for number in range(times(12, long=200)):
        if number % 3 == 0:  # its bytes must be compared, not its time alone
            with contextlib.suppress(OSError):
                os.utime(out / name, (1, 1), follow_symlinks=False)
        with exchanging(out / name, *instead):
            done = odmoe(command[0], model, out, *command[1:])
        statuses.add(done.returncode)
        assert done.returncode in (0, 1, 3)
        # A file that `--force` has written stands where the other was, which is aside now.
        assert victim.read_bytes() == whole[name]
        if not (out / name).is_file() or (out / name).is_symlink():
            break  # replaced as it should be: nothing is left to exchange
    assert statuses


def test_a_tree_that_is_compared_keeps_its_times_of_access(tmp_path, model):
    """Looking is no use of a file: backups and cleaners go by that."""
    out = tmp_path / "out"
    succeed("materialize", model, out)
    paths = [out, *out.rglob("*")]
    for path in paths:
        os.utime(path, ns=(1, path.stat().st_mtime_ns))
    for command in ("verify", "materialize"):
        odmoe(command, model, out)
        assert {path.stat().st_atime_ns for path in paths} == {1}
