"""docs/FORMS.md: its tables against what is shown of a toy of each type, as MLX reads it."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest

from odmoe import REPO, succeed
from reference import read_header

PAGE = (REPO / "docs/FORMS.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if len(cells := line.strip("| ").split(" | ")) == 6 and re.fullmatch(r"I?[A-Z]+\d\w*", cells[0])
}
REQUANTISED = ["Q6_K", "Q2_K", "IQ2_XS", "IQ2_S"]
FILE = "experts/layer_00_expert_001.safetensors"
DIM, FFN = 256, 512


def arrays(model, *form):
    """An expert in a form, and what its file says was done to `w1.weight`."""
    out = model.with_name("-".join(form))
    succeed("materialize", model, out, "--as", *form, "--experts-only", "--layers", 0, "--experts", 1)
    said = json.loads(read_header(out / FILE).metadata["odmoe.tensors"])["w1.weight"]
    return mx.load(str(out / FILE)), said.get("form")


def numbers(expert, said):
    """The matrix `w1` as MLX sees it. It computes in the dtype of the scales, so they are F32 here."""
    scales, biases = (expert.get(f"w1.{part}") for part in ("scales", "biases"))
    if said["mode"] == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    how = {key: said[key] for key in ("mode", "bits", "group_size")}
    return np.array(mx.dequantize(expert["w1.weight"], scales, biases, **how).astype(mx.float32), np.float64)


def assert_is(error, written):
    """As large as the page says, or smaller to a degree: toys are not normal weights."""
    if written == "0":
        assert error == 0
    else:
        assert float(written) / 4 < error < 1.25 * float(written)


def test_the_page_has_a_row_for_every_type():
    types = re.findall(r"\b[A-Z]+\d\w*\b", re.search(r"possible values: ([^]]*)", succeed("toy", "--help"), re.S)[1])
    quantised = {name for name in types if not re.fullmatch(r"B?[FI]\d+", name)}
    # Toys are of the types that gguf-py can write.
    assert set(ROWS) == quantised | {"Q2_0"}
    assert set(REQUANTISED) == set(re.search(r"\*\*(.*?) have no exact map", PAGE.replace("\n", " "))[1].replace(" and", ",").split(", "))


@pytest.mark.parametrize("kind", sorted(set(ROWS) - {"Q2_0"}))
def test_the_tables_say_what_mlx_is_shown(kind, tmp_path):
    how, in_model, in_mlx, f16, bf16 = ROWS[kind]
    model = tmp_path / "toy.gguf"
    succeed("toy", model, "--type", kind, "--dim", DIM, "--ffn-dim", FFN, "--vocab", 64)
    (right, _) = arrays(model, "f32")
    right = np.array(right["w1.weight"], np.float64)
    requant = ["--requant"] if kind in REQUANTISED else []
    if requant:
        plain, said = arrays(model, "mlx")
        assert said == {"dtype": "F16"} and plain["w1.weight"].dtype == mx.float16
    for scales, written in (("f32", f16 if requant else "0"), ("f16", f16), ("bf16", bf16)):
        expert, said = arrays(model, "mlx", "--scales", scales, *requant)
        assert how == f"{said['mode']}, {said['bits']}, {said['group_size']}"
        error = np.linalg.norm(numbers(expert, said) - right) / np.linalg.norm(right)
        assert_is(error, written)
        assert said["exact"] == (error == 0)
        if scales == "f16":
            weights = [array for name, array in expert.items() if name.startswith("w1.")]
            assert float(in_mlx) == sum(array.nbytes for array in weights) * 8 / (DIM * FFN)
    expert, _ = arrays(model, "f16")
    raw, _ = arrays(model, "raw")
    assert float(in_model) == pytest.approx(raw["w1.weight"].nbytes * 8 / (DIM * FFN), abs=1e-3)
    exact = re.search(r"2e-4\. (.*?) are exact in F16; (.*?) in BF16", PAGE.replace("\n", " "))
    in_f16, in_bf16 = (names.replace(" and", ",").split(", ") for names in exact.groups())
    assert (np.array(expert["w1.weight"], np.float64) == right).all() == (kind in in_f16)
    expert, _ = arrays(model, "bf16")
    error = np.linalg.norm(np.array(expert["w1.weight"].astype(mx.float32), np.float64) - right) / np.linalg.norm(right)
    assert_is(error, "0" if kind in in_bf16 else "1.7e-3")
