"""Which file holds which tensor, under which name, shape and order: sections 1.1 to 1.3 of the contract.

Everything is worked out again by `reference` and compared; then the partition is checked from the mount alone, so that an
error made twice would still show.
"""

import json
import re

from odmoe import DOCUMENTS, files_of, promises, succeed
from reference import best_start, read_header


def safetensors_of(shown):
    return {name: path for name, path in files_of(shown.root).items() if name.endswith(".safetensors")}


def test_the_tree_holds_exactly_the_files_of_the_contract(shown):
    assert set(files_of(shown.root)) == set(shown.layout) | DOCUMENTS
    assert sorted(p.name for p in shown.root.iterdir()) == ["base_model", "experts"]


def test_headers_name_the_tensors_in_source_order_with_dtype_and_shape(shown):
    for name, path in safetensors_of(shown).items():
        at, expected = 0, {}
        for e in shown.layout[name]:
            expected[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [at, at + e.nbytes]}
            at += e.nbytes
        header = read_header(path)
        assert header.tensors == expected, name
        assert list(header.tensors) == list(expected), f"{name}: order"
        assert path.stat().st_size == header.start + at, f"{name}: size"


def test_header_metadata_says_where_each_tensor_comes_from(shown):
    architecture = shown.parts[0].values["general.architecture"].value.decode()
    for name, path in safetensors_of(shown).items():
        expected = {"format": "pt", "odmoe.layout": "2", "general.architecture": architecture}
        if m := re.fullmatch(r"experts/layer_(\d+)_expert_(\d+)\.safetensors", name):
            expected |= {"layer": str(int(m[1])), "expert": str(int(m[2]))}
        metadata = read_header(path).metadata
        notes = json.loads(metadata.pop("odmoe.tensors"))
        assert metadata == expected, name
        assert notes == {e.name: e.note for e in shown.layout[name]}, name
        assert list(notes) == [e.name for e in shown.layout[name]], f"{name}: order"


def test_headers_are_minified_json_padded_with_spaces(shown):
    for name, path in safetensors_of(shown).items():
        header = read_header(path)
        text = header.text.rstrip(" ")
        assert text.startswith('{"__metadata__":{'), name
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False), name


def test_payloads_start_where_most_bytes_are_page_congruent_with_the_model(shown):
    for name, path in safetensors_of(shown).items():
        header = read_header(path)
        unpadded = 8 + len(header.text.rstrip(" ").encode())
        assert header.start == best_start(shown.layout[name], unpadded), name
        assert header.start % 8 == 0, name


def test_multi_byte_tensors_are_aligned_to_their_own_size(shown):
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1}
    for name, path in safetensors_of(shown).items():
        for tensor, info in read_header(path).tensors.items():
            assert info["data_offsets"][0] % widths[info["dtype"]] == 0, f"{name}: {tensor}"


@promises("Every byte of every tensor of the model is in exactly one file of the tree, exactly once.")
def test_every_byte_of_the_model_is_in_exactly_one_file(shown):
    """From the mount alone: each payload is where its header says it comes from, and together they are the model."""
    ranges = []
    for name, path in safetensors_of(shown).items():
        header, data = read_header(path), path.read_bytes()
        notes = json.loads(header.metadata["odmoe.tensors"])
        for tensor, info in header.tensors.items():
            first, end = info["data_offsets"]
            part, offset = notes[tensor]["gguf_part"], notes[tensor]["gguf_offset"]
            ours = data[header.start + first : header.start + end]
            assert ours == shown.bytes[part][offset : offset + end - first], f"{name}: {tensor}"
            ranges.append((part, offset, offset + end - first))
    for t in shown.tensors:
        inside = sorted(
            r for r in ranges if r[0] == t.part and t.offset <= r[1] and r[2] <= t.offset + t.nbytes and r[2] > r[1]
        )
        reached = t.offset
        for _, first, end in inside:
            assert first == reached, f"{t.name}: hole or overlap at {first}"
            reached = end
        assert reached == t.offset + t.nbytes, t.name
    assert sum(end - first for _, first, end in ranges) == sum(t.nbytes for t in shown.tensors)


def test_inspect_counts_the_bytes_that_are_not_page_congruent(shown):
    """From the mount alone, again: those whose place in the page differs between file and model."""
    said = json.loads(succeed("inspect", shown.paths[0], "--json"))["tree"]
    found = {True: 0, False: 0}
    for name, path in safetensors_of(shown).items():
        header = read_header(path)
        notes = json.loads(header.metadata["odmoe.tensors"])
        for tensor, info in header.tensors.items():
            first, end = info["data_offsets"]
            if (header.start + first - notes[tensor]["gguf_offset"]) % 4096:
                found[name.startswith("experts/")] += end - first
    assert said["incongruent_bytes"] == sum(found.values())
    assert said["incongruent_expert_bytes"] == found[True]
