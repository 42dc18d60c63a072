"""llama.cpp's own converter and tools, from the source distribution of `llama-cpp-python`: only for the long form."""

import importlib
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from unittest import mock

import gguf
import numpy as np

from models import finish
from odmoe import REPO

PACKAGE = "llama-cpp-python==0.3.36"
ROOT = REPO / "target/llama.cpp"
BINDINGS = REPO / "target/llama-cpp-python"
TOOLS = ["llama-gguf-split", "llama-quantize"]


def llama_cpp():
    """The folder of the sources, with the tools built in build/bin. Made once; it takes a quarter of an hour."""
    if not ROOT.exists():
        folder = BINDINGS
        # pip asks the package for its metadata, and so needs what it is built with; those may be wheels.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--no-binary", "llama-cpp-python", "-d", folder, PACKAGE], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        (folder / archive.name.removesuffix(".tar.gz") / "vendor/llama.cpp").rename(ROOT)
    if not all((ROOT / "build/bin" / tool).exists() for tool in TOOLS):
        cmake = [sys.executable, "-m", "cmake"]
        off = ["GGML_NATIVE", *(f"LLAMA_{part}" for part in ("OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER"))]
        flags = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
        # The package's, which is not on the path unless its environment is active.
        flags.append(f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).with_name('ninja')}")
        subprocess.run([*cmake, "-S", ROOT, "-B", ROOT / "build", "-G", "Ninja", *flags], check=True)
        subprocess.run([*cmake, "--build", ROOT / "build", "--target", *TOOLS], check=True)
    return ROOT


def tool(name, *arguments):
    subprocess.run([llama_cpp() / "build/bin" / name, *arguments], check=True, capture_output=True)


def logits(model, prompts, repack=True, **options):
    """What llama.cpp computes for each prompt, all of the same length, with keys and values in F32.

    Without `repack`, other kernels multiply: those of the blocks as the file has them.
    """
    llama_cpp()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(ROOT / "build/bin")
    (package,) = BINDINGS.glob("llama_cpp_python-*/llama_cpp")
    # The folder is called like this module, and wants a library for caches, which nothing here uses.
    sys.modules.setdefault("diskcache", types.SimpleNamespace(Cache=object))
    own = sys.modules.pop("llama_cpp", None)
    sys.path.insert(0, str(package.parent))
    try:
        bindings = importlib.import_module("llama_cpp")
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name == "llama_cpp"]:
            del sys.modules[name]
        if own:
            sys.modules["llama_cpp"] = own
    defaults = bindings.llama_cpp.llama_model_default_params

    def parameters():
        made = defaults()
        made.use_extra_bufts = repack
        return made

    options = {"verbose": False, "n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0} | options
    with mock.patch.object(bindings.llama_cpp, "llama_model_default_params", parameters):
        loaded = bindings.Llama(str(model), logits_all=True, **options)
    computed = []
    for prompt in prompts:
        loaded.reset()
        loaded.eval(prompt)
        computed.append(np.array(loaded.scores[: len(prompt)]))
    return np.array(computed)


def importances(model, out):
    """Writes what llama-quantize needs for the smallest types: here, every column of a matrix matters as much."""
    writer = gguf.GGUFWriter(out, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.name.endswith(".weight") and len(tensor.shape) > 1:
            matrices = int(np.prod(tensor.shape[2:]))
            writer.add_tensor(f"{tensor.name}.in_sum2", np.ones((matrices, int(tensor.shape[0])), np.float32))
            writer.add_tensor(f"{tensor.name}.counts", np.ones((matrices, 1), np.float32))
    finish(writer)


def quantised(model, out, ftype):
    """Quantises a GGUF of F32."""
    matrix = out.with_suffix(".imatrix")
    importances(model, matrix)
    tool("llama-quantize", "--imatrix", matrix, model, out, ftype, "2")


def dequantised(model, out):
    """The numbers of a quantised GGUF as F32."""
    tool("llama-quantize", "--allow-requantize", model, out, "F32", "2")


# Runs the converter; the checkpoint has no tokenizer, so it gets one of single characters.
CONVERTER = """
import sys
root = sys.argv.pop(1)
sys.path[:0] = [root, root + "/gguf-py"]
import convert_hf_to_gguf as converter

def one_of_characters(self):
    size = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("gpt2")
    self.gguf_writer.add_tokenizer_pre("qwen2")
    self.gguf_writer.add_token_list([chr(256 + n) for n in range(size)])
    self.gguf_writer.add_token_types([1] * size)
    self.gguf_writer.add_token_merges([])

found = converter.get_model_class
def get_model_class(*arguments, **options):
    model_class = found(*arguments, **options)
    model_class.set_vocab = one_of_characters
    return model_class
converter.get_model_class = get_model_class
converter.main()
"""


def convert(checkpoint, out, outtype, *flags):
    """Turns a checkpoint into a GGUF."""
    command = [sys.executable, "-c", CONVERTER, llama_cpp(), checkpoint, "--outfile", out, "--outtype", outtype, *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
