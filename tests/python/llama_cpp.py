"""llama.cpp's own converter and tools, from the source distribution of `llama-cpp-python`: only for the long form."""

import subprocess
import sys
import tarfile

from odmoe import REPO

PACKAGE = "llama-cpp-python==0.3.36"
ROOT = REPO / "target/llama.cpp"
TOOLS = ["llama-gguf-split", "llama-quantize"]


def llama_cpp():
    """The folder of the sources, with the tools built in build/bin. Made once; it takes a quarter of an hour."""
    if not ROOT.exists():
        folder = REPO / "target/llama-cpp-python"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--no-build-isolation", "-d", folder, PACKAGE], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        (folder / archive.name.removesuffix(".tar.gz") / "vendor/llama.cpp").rename(ROOT)
    if not all((ROOT / "build/bin" / tool).exists() for tool in TOOLS):
        cmake = [sys.executable, "-m", "cmake"]
        flags = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DGGML_NATIVE=OFF"]
        subprocess.run([*cmake, "-S", ROOT, "-B", ROOT / "build", "-G", "Ninja", *flags], check=True)
        subprocess.run([*cmake, "--build", ROOT / "build", "--target", *TOOLS], check=True)
    return ROOT


def tool(name, *arguments):
    subprocess.run([llama_cpp() / "build/bin" / name, *arguments], check=True, capture_output=True)


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
