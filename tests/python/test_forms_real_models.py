"""The tensor tables of real models as numbers: files of full size, their payload a hole, in every form."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from odmoe import DATA, KIB, daemon_of, mounted, sparse_gguf
from reference import layout, read_gguf, read_header

EXPECTED = json.loads((DATA / "expected_layout.json").read_text())
WIDTHS = {"U32": 4, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "F64": 8, "I64": 8, "I16": 2}
FORMS = ["bf16", "f32", "mlx"]


def check_file(path, entries, form):
    """A header that accounts for every byte, and tensors of the right shapes."""
    header = read_header(path)
    at = 0
    for info in header.tensors.values():
        start, end = info["data_offsets"]
        assert start == at and end - start == np.prod(info["shape"], dtype=object) * WIDTHS[info["dtype"]]
        at = end
    assert path.stat().st_size == header.start + at
    assert header.metadata["odmoe.form"] == form
    for entry in entries:
        info = header.tensors[entry.name]
        if entry.dtype != "U8":
            assert (info["dtype"], info["shape"]) == (entry.dtype, entry.shape)
        elif info["dtype"] != "U32":
            assert info["shape"] == list(reversed(entry.dims))
            assert info["dtype"] == (form.upper() if form != "mlx" else "F16")
    return header


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_of_full_size_is_shown_in_every_form(name, tmp_path):
    (model,) = sparse_gguf(name, tmp_path / "model.gguf")
    files = layout(read_gguf([model]))
    experts = [path for path in files if path.startswith("experts/")]
    sample = [path for path in files if path not in set(experts)] + experts[:: max(1, len(experts) // 12)]
    for form in FORMS:
        with mounted(model, tmp_path / "mnt", "--as", form) as root:
            registry = json.loads((root / "experts/registry.json").read_text())
            assert len(registry) == len(experts)
            for path in sample:
                header = check_file(root / path, files[path], form)
                with (root / path).open("rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    for at in (header.start, size // 2, size - 4 * KIB):
                        got = os.pread(file.fileno(), 4 * KIB, max(at, 0))
                        assert len(got) == min(4 * KIB, size - max(at, 0))
            for item in list(registry.values())[:: max(1, len(experts) // 12)]:
                assert item["size"] == (root / item["path"]).stat().st_size
            status = Path(f"/proc/{daemon_of(root)}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
            assert peak < 96 * KIB, f"the daemon's memory peaked at {peak} KiB"
