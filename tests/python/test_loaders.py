"""What loaders say that users meet, as docs/TROUBLESHOOTING.md quotes it, and that what the page advises helps."""

import re
import subprocess
import sys

import pytest

from odmoe import REPO, mounted, succeed

PAGE = re.sub(r"\s+", " ", (REPO / "docs/TROUBLESHOOTING.md").read_text().split("## The loader")[1].split("\n## ")[0])
OPEN = "from safetensors import safe_open\nf = safe_open({file!r}, framework={framework!r})\nf.get_tensor('w1.weight')\n"


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Toys as files, by their type."""
    folder = tmp_path_factory.mktemp("loaders")
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
