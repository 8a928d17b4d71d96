# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of compressing a 1 GB file to a file, against its largest tensor.

Writes a synthetic .safetensors file into a temporary folder, compresses it in a process of its own with
`skfactor.compress_file`, reads every tensor back from the .skf file one by one in another, and prints and stores
the peaks of resident memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import RESULTS, environment, resident_memory

LARGEST = (32_000, 1024)  # an embedding; 131 MB in float32
OTHERS = (2048, 2048)  # 16.8 MB each


def write_model(path, total_bytes, scale=1):
    """A .safetensors file of normal weights; returns bytes of the file and of its largest tensor."""
    from skfactor.codec.safetensors_io import write_safetensors

    largest, other = (tuple(s // scale for s in shape) for shape in (LARGEST, OTHERS))
    n_others = max(1, int((total_bytes - 4 * np.prod(largest)) // (4 * np.prod(other))))
    shapes = {"embedding.weight": largest, **{f"layer{i}.weight": other for i in range(n_others)}}

    def tensors():
        for seed, (name, shape) in enumerate(shapes.items()):
            yield name, "float32", shape, weights(seed, shape)

    write_safetensors(path, tensors())
    return os.path.getsize(path), 4 * int(np.prod(largest))


def weights(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def compress(folder, options):
    from skfactor import KMeansWeightSharer, compress_file

    rules = {"*": KMeansWeightSharer(options.clusters, coder=options.coder)}
    compress_file(os.path.join(folder, "in.safetensors"), os.path.join(folder, "out.skf"), rules, n_jobs=options.jobs,
                  progress=False)


def decompress(folder, options):
    from skfactor.bridge.files import decompress_file

    decompress_file(os.path.join(folder, "out.skf"), os.path.join(folder, "back.safetensors"))


def in_own_process(step, folder, options):
    """Seconds and peak memory of one step, beside the memory of the imports."""
    command = [sys.executable, __file__, "--step", step, "--folder", folder, "--clusters", str(options.clusters),
               "--jobs", str(options.jobs), "--coder", options.coder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_step(options):
    import skfactor

    _ = skfactor.compress_file  # the import of torch belongs to the start, not to the work
    start, begin = resident_memory("VmRSS"), time.perf_counter()
    {"compress": compress, "decompress": decompress}[options.step](options.folder, options)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": round(seconds, 2), "start_bytes": start, "peak_bytes": resident_memory("VmHWM")}))


def worst_relative_error(folder):
    """Largest relative squared error of a tensor read back, of the first, the second and the last."""
    from skfactor.codec.safetensors_io import SafetensorsReader

    with SafetensorsReader(os.path.join(folder, "in.safetensors")) as before, \
            SafetensorsReader(os.path.join(folder, "back.safetensors")) as after:
        names = list(before.names)
        worst = 0.0
        for name in {names[0], names[1], names[-1]}:
            x, y = before.read(name).astype(np.float64), after.read(name)
            worst = max(worst, float(np.square(x - y).sum() / np.square(x).sum()))
    return worst


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--tiny", action="store_true", help="64 times smaller tensors")
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--coder", default="auto", help="entropy coder of the codes")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_1gb.json")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        run_step(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        scale = 8 if options.tiny else 1
        source_bytes, largest = write_model(os.path.join(folder, "in.safetensors"), options.bytes / scale**2, scale)
        found = {"benchmark": "memory_1gb", "environment": environment(),
                 "settings": {"n_clusters": options.clusters, "n_jobs": options.jobs, "coder": options.coder,
                              "tiny": options.tiny},
                 "source_bytes": source_bytes, "largest_tensor_bytes": largest}
        for step in ("compress", "decompress"):
            found[step] = in_own_process(step, folder, options)
            used = found[step]["peak_bytes"] - found[step]["start_bytes"]
            found[step] |= {"extra_bytes": used, "extra_over_largest": round(used / largest, 3)}
            print(f"{step}: peak {found[step]['peak_bytes'] / 1e6:.0f} MB, of which the imports "
                  f"{found[step]['start_bytes'] / 1e6:.0f} MB; the rest is {used / largest:.2f} times the largest "
                  f"tensor ({largest / 1e6:.0f} MB); {found[step]['seconds']:.1f} s")
        found["file_bytes"] = os.path.getsize(os.path.join(folder, "out.skf"))
        found["worst_relative_error"] = worst_relative_error(folder)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
