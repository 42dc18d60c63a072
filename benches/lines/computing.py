"""What numbers cost: blocks in memory as F32, F16, BF16 and MLX's arrays, one thread, nothing read or written."""

import json
import time

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lab import EXAMPLES, run
from measure import NO_LIMIT, OURS, Figure, at_least, interleave

from . import line

TYPES = "Q1_0 Q2_0 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S "
TYPES += "IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4"
JUDGED = {"Q4_K", "Q6_K", "Q8_0", "MXFP4"}
GGUF_PY = "gguf-py"
WEIGHTS = 1 << 20


def gguf_py(name):
    """GB/s of blocks to BF16; None for the two types that it does not know."""
    ggml_type = GGMLQuantizationType.__members__.get(name)
    if ggml_type is None or name == "Q1_0":
        return None
    weights, size = GGML_QUANT_SIZES[ggml_type]
    # 64 rows; all bytes 0x2C, so that scales are small numbers.
    blocks = np.full((64, WEIGHTS // weights * size // 64), 0x2C, np.uint8)
    start = time.perf_counter_ns()
    dequantize(blocks, ggml_type).astype(ml_dtypes.bfloat16)
    return blocks.nbytes / (time.perf_counter_ns() - start)


@line("codec", "blocks in memory to numbers and MLX's arrays, one thread; against anamnesis, gguf-py and memcpy")
def codec(lab):
    """Numbers in GB/s of blocks, as anamnesis and gguf-py have them; MLX's arrays in GB/s of output."""
    for name in TYPES.split():
        sides = {OURS: lambda n=name: json.loads(run(EXAMPLES / "codec_bench", n)), GGUF_PY: lambda n=name: gguf_py(n)}
        taken = interleave(sides, lab.samples)
        judged = name in JUDGED
        for output in ("f32", "f16", "bf16"):
            samples = {side: [sample[output][side] for sample in taken[OURS]] for side in (OURS, "anamnesis")}
            limit = at_least(2, 4) if judged and output == "bf16" else NO_LIMIT
            yield Figure(f"{name} to {output}", "GB/s", samples, limit)
        if taken[GGUF_PY][0] is not None:
            samples = {OURS: [sample["bf16"][OURS] for sample in taken[OURS]], GGUF_PY: taken[GGUF_PY]}
            yield Figure(f"{name} to bf16", "GB/s", samples, at_least(30, 100) if judged else NO_LIMIT)
        samples = {side: [sample["mlx"][side] for sample in taken[OURS]] for side in (OURS, "memcpy")}
        each = {key: [sample["mlx"].get(key, 0) for sample in taken[OURS]] for key in ("weight", "scales", "biases")}
        note = ", ".join(f"{key} {sorted(values)[len(values) // 2]:.1f}" for key, values in each.items() if any(values))
        limit = at_least(0.12, 0.2) if name == "Q4_K" else NO_LIMIT
        yield Figure(f"{name} to mlx", "GB/s", samples, limit, f"{name}, GB/s of each array: {note}")
