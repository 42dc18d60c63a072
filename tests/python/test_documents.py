"""registry.json, metadata.json and metadata.gguf: section 1.4 of the contract."""

import json
import math
import re
from collections import Counter

import gguf
import numpy as np

from odmoe import mounted, promises, sparse_gguf
from reference import NAMES

BASE = ("embeddings", "attention_layers", "norms", "lm_head")
KEYS = [
    "extracted", "components", "architecture", "block_count", "embedding_length", "vocab_size", "expert_count",
    "expert_used_count", "moe_layers", "ggml_types", "parts", "weight_map", "gguf",
]  # fmt: skip


def metadata_text(shown):
    return (shown.root / "base_model" / "metadata.json").read_text()


def metadata(shown):
    return json.loads(metadata_text(shown))


def test_the_registry_is_the_reference_converter_s(shown):
    expected = {}
    for path, entries in sorted(
        shown.expert_files().items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]
    ):
        layer, expert = map(int, re.findall(r"\d+", path))
        expected[path.removeprefix("experts/").removesuffix(".safetensors")] = {
            "path": path,
            "size": (shown.root / path).stat().st_size,
            "layer": layer,
            "expert_id": expert,
            "tensors": sorted(e.name for e in entries),
        }
    assert (shown.root / "experts" / "registry.json").read_text() == json.dumps(expected, indent=2)


def test_metadata_json_is_written_as_python_writes_it(shown):
    text = metadata_text(shown)
    # Numbers with a fraction are kept as they stand: their text is the subject of another test.
    again = json.dumps(json.loads(text, parse_float=lambda digits: f"<<{digits}>>"), indent=2, ensure_ascii=False)
    assert text == re.sub(r'"<<(.*?)>>"', r"\1", again)
    assert list(json.loads(text)) == KEYS


def test_metadata_json_counts_what_the_tree_holds(shown):
    found, layout = metadata(shown), shown.layout
    assert found["extracted"] is True
    assert found["components"] == {name: len(layout.get(f"base_model/{name}.safetensors", [])) for name in BASE}
    assert found["moe_layers"] == sorted({int(re.findall(r"\d+", path)[0]) for path in shown.expert_files()})
    counts, sizes = Counter(t.type for t in shown.tensors), Counter()
    for t in shown.tensors:
        sizes[t.type] += t.nbytes
    assert found["ggml_types"] == {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in counts}
    assert found["parts"] == [path.stat().st_size for path in shown.paths]
    experts = [int(re.findall(r"\d+", path)[1]) for path in shown.expert_files()]
    assert found["expert_count"] == max(experts, default=-1) + 1


def test_metadata_json_tells_the_hyper_parameters(built):
    found, values = metadata(built), {key: v.value for key, v in built.parts[0].values.items()}
    assert found["architecture"] == "moe"
    for key in ("block_count", "embedding_length", "expert_used_count"):
        assert found[key] == values.get(f"moe.{key}"), key
    embedding = next(t for t in built.tensors if t.name == "token_embd.weight")
    assert found["vocab_size"] == len(values.get("tokenizer.ggml.tokens", range(embedding.dims[1])))


def test_the_weight_map_leads_to_every_tensor_of_the_base(shown):
    """File names as in a Hugging Face index: relative to the folder that both lie in."""
    expected = {
        e.name: path.removeprefix("base_model/")
        for path, entries in shown.layout.items()
        for e in entries
        if path.startswith("base_model/")
    }
    assert metadata(shown)["weight_map"] == expected


def in_json(value):
    """What metadata.json says of a value, floats apart."""
    if value.type == 9:
        if len(value.value) > 64 or value.of == 9:
            return {"type": "array", "of": NAMES[value.of], "length": len(value.value)}
        return [in_json(v) for v in value.value]
    if value.type == 8:
        if len(value.value) > 64 << 10:
            return {"type": "string", "length": len(value.value)}
        return value.value.decode(errors="replace")
    if value.type == 7:
        return bool(value.value)
    if value.type in (6, 12):
        return np.float32(value.value) if value.type == 6 else value.value
    return value.value


def same(digits, expected):
    """A value of metadata.json, its floats still as text, against what it should be."""
    if isinstance(expected, list):
        return len(digits) == len(expected) and all(map(same, digits, expected))
    if isinstance(expected, (np.float32, float)) and not math.isfinite(expected):
        return isinstance(digits, str) and str(float(digits)) == str(expected)
    if isinstance(expected, (np.float32, float)):
        shortest = np.format_float_scientific(expected, unique=True, trim="-")
        significant = re.sub(r"e.*|[.+-]", "", str(digits)).strip("0")
        return type(expected)(digits) == expected and len(significant) == len(
            re.sub(r"e.*|[.-]", "", shortest).strip("0")
        )
    return type(digits) is type(expected) and digits == expected


def test_metadata_json_gives_every_key_in_order_with_its_value(shown):
    found = json.loads(metadata_text(shown), parse_float=str)["gguf"]
    values = shown.parts[0].values
    assert list(found) == list(values)
    for key, value in values.items():
        assert same(found[key], in_json(value)), f"{key}: {found[key]!r} for {value}"


@promises("No file of the tree names a path or a file of the machine.")
def test_nothing_in_the_tree_names_a_place_on_this_machine(shown):
    for path in shown.root.rglob("*.json"):
        text = path.read_text()
        for place in (*shown.paths, *(p.parent for p in shown.paths)):
            assert place.name not in text, path


@promises("Every file of `base_model/` and `experts/` is an ordinary safetensors file, a JSON document, or a GGUF without tensors.")
def test_gguf_py_finds_every_key_in_metadata_gguf(built):
    ours = gguf.GGUFReader(built.root / "base_model" / "metadata.gguf")
    theirs = gguf.GGUFReader(built.paths[0])
    assert ours.fields["GGUF.tensor_count"].contents() == 0
    assert ours.tensors == []
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        if key in ("GGUF.tensor_count", "odd.invalid"):  # the latter is no text: see the next test
            continue
        wanted = 0 if key == "split.count" else field.contents()
        np.testing.assert_equal(ours.fields[key].contents(), wanted, key)
        assert ours.fields[key].types == field.types, key


def test_metadata_gguf_is_a_header_and_the_model_s_own_bytes(shown):
    part = shown.parts[0]
    data = (shown.root / "base_model" / "metadata.gguf").read_bytes()
    header = (
        b"GGUF"
        + part.version.to_bytes(4, "little")
        + (0).to_bytes(8, "little")
        + len(part.values).to_bytes(8, "little")
    )
    values = part.values_bytes
    if "split.count" in part.values:
        at = values.index(b"split.count") + len("split.count") + 4
        values = values[:at] + b"\0\0" + values[at + 2 :]
    assert data == header + values


def test_long_arrays_are_told_by_length_and_kept_whole_in_metadata_gguf(tmp_path):
    (kimi,) = sparse_gguf(
        "kimi-k2.5-q4_k_m", tmp_path / "k.gguf", "--tokenizer", "--keep-layers", 2, "--keep-experts", 2
    )
    with mounted(kimi, tmp_path / "mnt") as root:
        found = json.loads((root / "base_model" / "metadata.json").read_text())
        assert found["gguf"]["tokenizer.ggml.tokens"] == {"type": "array", "of": "string", "length": 163840}
        assert found["vocab_size"] == 163840
        assert (root / "base_model" / "metadata.gguf").stat().st_size > 5_000_000
