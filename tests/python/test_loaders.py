"""What loaders say that users meet, as docs/TROUBLESHOOTING.md quotes it, and that what the page advises helps."""

import re
import subprocess
import sys

import gguf
import numpy as np
import pytest

from odmoe import REPO, mounted, succeed

PAGE = re.sub(r"\s+", " ", (REPO / "docs/TROUBLESHOOTING.md").read_text().split("## The loader")[1].split("\n## ")[0])
OPEN = "from safetensors import safe_open\nf = safe_open({file!r}, framework={framework!r})\nf.get_tensor('w1.weight')\n"


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Toys as files, by their type; those that MLX reads packed, below `mlx`, too."""
    folder = tmp_path_factory.mktemp("loaders")
    for kind in ("q4_k", "q6_k", "mxfp4"):
        succeed("toy", folder / f"mlx-{kind}.gguf", "--type", kind, "--dim", 256, "--ffn-dim", 256, "--vocab", 64)
        succeed("materialize", folder / f"mlx-{kind}.gguf", folder / "mlx" / kind, "--as", "mlx")
    for kind in ("bf16", "f64", "q4_k"):
        succeed("toy", folder / f"{kind}.gguf", "--type", kind, "--dim", 256, "--ffn-dim", 256, "--vocab", 64)
        succeed("materialize", folder / f"{kind}.gguf", folder / kind)
    return folder


def expert(trees, kind):
    return str(trees / kind / "experts/layer_00_expert_001.safetensors")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def assert_says(code, message):
    """The code fails with a message that the page quotes."""
    done = python(code)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert f"`{message}" in PAGE or f", `{message}" in PAGE, message


def assert_runs(code):
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("framework", ["numpy", "mlx"])
def test_bf16_needs_ml_dtypes(framework, trees):
    read = OPEN.format(file=expert(trees, "bf16"), framework=framework)
    first = "import mlx.core\n" if framework == "mlx" else ""
    assert_says(first + read, "TypeError: data type 'bfloat16' not understood")
    assert_runs(first + "import ml_dtypes\n" + read)
    load = f"from safetensors.{framework} import load_file\nload_file({expert(trees, 'bf16')!r})\n"
    assert_says(load, "TypeError: data type 'bfloat16' not understood")
    assert_runs("import ml_dtypes\n" + load)
    assert_runs(f"import mlx.core as mx\nmx.eval(mx.load({expert(trees, 'bf16')!r}))")


def test_mlx_must_be_imported(trees):
    read = OPEN.format(file=expert(trees, "f64"), framework="mlx")
    assert_says(read, "AttributeError: module 'mlx' has no attribute 'core'")
    assert_runs("import mlx.core\n" + read)


def test_numpy_takes_no_bf16_of_mlx(trees):
    load = f"import mlx.core as mx, numpy as np\nw = mx.load({expert(trees, 'bf16')!r})['w1.weight']\n"
    assert_says(load + "np.array(w)", "ValueError: 'bfloat16' is not a valid PEP 3118 buffer format string")
    assert_runs(load + "assert np.array(w.astype(mx.float32)).dtype == np.float32")


def test_mlx_refuses_f64(trees):
    assert_says(f"import mlx.core as mx\nmx.load({expert(trees, 'f64')!r})", "RuntimeError: [safetensor] unsupported dtype F64")
    assert_runs("import mlx.core\n" + OPEN.format(file=expert(trees, "f64"), framework="mlx"))


def test_mlx_keeps_files_open_until_arrays_are_evaluated(trees):
    code = f"""
import resource, mlx.core as mx
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
keep = []
for _ in range(40):
    keep.append(mx.load({expert(trees, 'bf16')!r}))
"""
    assert_says(code, "RuntimeError: [load_safetensors] Failed to open file")
    assert_runs(code + "    mx.eval(keep[-1])\n")


def test_blocks_are_no_numbers(trees):
    load = f"import mlx.core as mx\nw = mx.load({expert(trees, 'q4_k')!r})['w1.weight']\nassert w.dtype == mx.uint8\n"
    assert_says(load + "mx.ones((1, 256)) @ w.T", "[matmul] Last dimension of first input with shape")
    read = OPEN.replace("f.get", "blocks = f.get").format(file=expert(trees, "q4_k"), framework="numpy")
    read += "import gguf, numpy as np\ntake = lambda b: gguf.quants.dequantize(b, gguf.GGMLQuantizationType.Q4_K)\n"
    assert_says(read + "take(blocks.view(np.float32))", "ValueError: Quantized tensor bytes per row")
    assert_runs(read + "assert take(blocks).shape == (256, 256)")


PACKED = """
import mlx.core as mx
w = mx.load({file!r})
x = mx.ones((1, 256), mx.bfloat16)
def multiply(name="w1", *, biases=True, **how):
    stem = f"{{name}}."
    biases = w.get(stem + "biases", w[stem + "scales"]) if biases else None
    y = mx.quantized_matmul(x, w[stem + "weight"], w[stem + "scales"], biases, **how)
    mx.eval(y)
    return y
"""


def test_mode_bits_and_group_are_those_of_the_type(trees):
    q4_k, mxfp4 = (PACKED.format(file=expert(trees / "mlx", kind)) for kind in ("q4_k", "mxfp4"))
    assert_says(
        q4_k + "multiply(group_size=64, bits=4)",
        "[quantized_matmul] The shapes of the weight and scales are incompatible based on bits and group_size",
    )
    assert_says(q4_k + "x @ w['w1.weight'].T", "[matmul] Last dimension of first input with shape")
    done = python(q4_k + "multiply(group_size=32, bits=4, biases=False)")
    words = "Biases must be provided for affine quantization"
    assert words in done.stderr and f"`{words}`" in PAGE
    assert_runs(q4_k + "multiply(group_size=32, bits=4)")
    wrong = "multiply(group_size=32, bits=4, mode='mxfp4')"
    assert_says(mxfp4 + wrong, "[quantized_matmul] Biases must be null for quantization mode")
    assert_runs(mxfp4 + wrong.replace(")", ", biases=False)"))


def test_what_mlx_cannot_pack_is_multiplied_by_as_it_is(trees):
    code = PACKED.format(file=expert(trees / "mlx", "q6_k")) + "w |= {'w1.scales': mx.ones((256, 8), mx.float16)}\n"
    assert_says(code + "multiply(group_size=32, bits=8)", "[quantized_matmul] The weight matrix should be uint32")
    assert_runs(code + "assert (x @ w['w1.weight'].T).shape == (1, 256)")
    succeed("materialize", trees / "mlx-q6_k.gguf", trees / "requant/q6_k", "--as", "mlx", "--requant")
    assert_runs(PACKED.format(file=expert(trees / "requant", "q6_k")) + "multiply(group_size=32, bits=8)")


def test_scales_have_the_dtype_of_the_activations(trees):
    code = "assert multiply(group_size=32, bits=4).dtype == mx."
    assert_runs(PACKED.format(file=expert(trees / "mlx", "q4_k")) + code + "float32")
    succeed("materialize", trees / "q4_k.gguf", trees / "scales/q4_k", "--as", "mlx", "--scales", "bf16")
    assert_runs(PACKED.format(file=expert(trees / "scales", "q4_k")) + code + "bfloat16")
    assert "Mount with `--scales` of the dtype of the activations" in PAGE


def test_biases_beyond_f16_are_infinite_and_bf16_holds_them(trees):
    """Q8_0 with a scale of 600, which no real model has: its bias is 128 times that."""
    model = trees / "large.gguf"
    succeed("toy", model, "--type", "q8_0", "--dim", 256, "--ffn-dim", 256, "--vocab", 64)
    tensor = next(t for t in gguf.GGUFReader(model, "r+").tensors if t.name == "blk.0.ffn_gate_exps.weight")
    tensor.data.reshape(-1, 34)[:, :2] = np.array([600], np.float16).view(np.uint8)
    tensor.data.base.flush()
    finite = "assert mx.isfinite(w['w1.biases'].astype(mx.float32)).all().item() is "
    for scales, is_finite in (("f16", False), ("bf16", True), ("f32", True)):
        out = trees / f"large-{scales}"
        succeed("materialize", model, out / "q8_0", "--as", "mlx", "--scales", scales)
        assert_runs(PACKED.format(file=expert(out, "q8_0")) + finite + str(is_finite))
    assert "finite with `--as f32`" in PAGE


@pytest.mark.parametrize("name", ["experts/registry.json", "base_model/metadata.json", "base_model/metadata.gguf"])
def test_documents_are_no_safetensors(name, trees):
    read = f"from safetensors import safe_open\nsafe_open({str(trees / 'bf16' / name)!r}, framework='numpy')"
    assert_says(read, "SafetensorError: Error while deserializing header")


def test_a_model_that_has_changed_is_an_error_in_every_loader(trees, tmp_path):
    model = tmp_path / "changing.gguf"
    succeed("toy", model, "--dim", 256, "--ffn-dim", 256, "--vocab", 64)
    with mounted(model, tmp_path / "mnt") as root:
        with model.open("r+b") as file:
            file.truncate(300_000)
        file = str(root / "experts/layer_01_expert_003.safetensors")
        assert_says(f"import mlx.core as mx\nmx.eval(mx.load({file!r}))", "RuntimeError: [read] Unable to read")
        assert "Input/output error" in python(f"open({file!r}, 'rb').read()").stderr
        mapped = python(OPEN.format(file=file, framework="numpy"))
        assert mapped.returncode == -7 and "`Bus error`" in PAGE and "`Input/output error`" in PAGE
