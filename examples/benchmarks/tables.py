# SPDX-License-Identifier: BSD-3-Clause
"""Write docs/benchmarks.md from the JSON files of `results/`: every number of that page comes from there.

    python examples/benchmarks/tables.py
"""

import argparse
import json
from pathlib import Path
from statistics import median

from harness import RESULTS
from requirements import rows as requirement_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
OURS = "skfactor solver"


def table(header, rows):
    """A markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def seconds(values):
    """Best and median of the runs."""
    best, middle = min(values), median(values)
    return f"{best:.3g}" if len(values) == 1 else f"{best:.3g} ({middle:.3g})"


def groups(runs):
    """Runs by data set and parameters, in order."""
    found = {}
    for run in runs:
        found.setdefault((run["dataset"], json.dumps(run["params"])), []).append(run)
    for (dataset, params), members in found.items():
        yield dataset, json.loads(params), members


def excluded(members):
    return "; ".join(f"{r['solver']}: {r['status']}" for r in members if r["status"] != "ok")


def reference(members):
    """Proven lower bound of the case if there is one, else the smallest inertia: (value, what it is)."""
    done = [r["objective"] for r in members if r["status"] == "ok" and r["objective"].get("inertia")]
    bounds = [o["lower_bound"] for o in done if o.get("lower_bound")]
    if bounds:
        return max(bounds), "above the proven optimum"
    measured = [r["objective"]["inertia"] for r in members if r["status"] == "ok" and r["solver"] != "np.sort alone"]
    return min(measured), "above the best"


def kmeans_tables(result):
    for dataset, params, members in groups(result["runs"]):
        done = [r for r in members if r["status"] == "ok"]
        if not done:
            continue
        best, gap_name = reference(members)
        ours = next((r for r in done if r["solver"] == OURS), None)
        header = ["solver", "wall s: best (median)", "CPU s: best (median)", "extra memory / data", gap_name,
                  "wall / skfactor's", "CPU / skfactor's"]
        rows = []
        for run in done:
            times = ["", ""]
            if ours:
                times = [f"{min(run[key]) / min(ours[key]):.3g}" for key in ("wall_s", "cpu_s")]
            gap = "" if run["solver"] == "np.sort alone" else f"{run['objective']['inertia'] / best - 1:.1e}"
            rows.append([run["solver"], seconds(run["wall_s"]), seconds(run["cpu_s"]), memory(run), gap, *times])
        yield f"### {dataset}, K = {params['n_clusters']}\n\n{table(header, rows)}\n{note(members)}"


def memory(run):
    return "" if run["extra_bytes"] is None else f"{run['extra_bytes'] / run['data_bytes']:.1f}"


def note(members):
    left_out = excluded(members)
    return f"\nLeft out: {left_out}.\n" if left_out else ""


def elbow_table(result):
    rows = [[f"{r['dataset']}, {r['solver']}", seconds(r["wall_s"]), seconds(r["cpu_s"]), memory(r),
             f"{r['objective']['worst_excess']:.1e}"] for r in result["runs"] if r["status"] == "ok"]
    yield table(["data, solver", "wall s: best (median)", "CPU s: best (median)", "extra memory / data",
                 "worst excess over the optimum"], rows) + "\n"


def optimality_table(result):
    rows = []
    for dataset, params, members in groups(result["runs"]):
        found = {r["solver"].rsplit(" ", 1)[1]: r["objective"] for r in members if r["status"] == "ok"}
        own, peer = found.get("certificate"), found.get("ckwrap", {})
        if own:
            worst = f"{peer['worst_excess']:.1e} ({peer['cases']})" if peer.get("cases") else ""
            rows.append([f"{dataset}, {params['variant']}", str(own["cases"]), f"{own['worst_excess']:.1e}",
                         str(own["above_1e-6"]), f"{own['worst_duality_gap']:.1e}", worst])
    yield table(["network or data, variant", "cases (layers x K)", "worst excess over the proven bound",
                 "cases above 1e-6", "worst duality gap of the certificate", "worst excess over ckwrap (cases)"],
                rows) + "\n"


def codec_tables(result):
    for dataset, _, members in groups(result["runs"]):
        done = [r for r in members if r["status"] == "ok"]
        if not done:
            continue
        rows = []
        for run in done:
            o = run["objective"]
            rate = o["n_codes"] / 1e6
            rows.append([run["solver"], f"{o['bytes']:,}", f"{100 * (o['bytes'] / o['entropy_bytes'] - 1):+.2f} %",
                         f"{rate / o['encode_s']:.3g}", f"{rate / o['decode_s']:.3g}", "yes" if o["exact"] else "NO"])
        facts = done[0]["objective"]
        intro = (f"{facts['n_codes']:,} codes in {facts['n_tensors']} tensors; order-0 entropy, a histogram for each "
                 f"tensor and its cost not counted: {facts['entropy_bytes']:,.0f} bytes.")
        header = ["coder", "bytes", "against the entropy", "encode, M codes/s", "decode, M codes/s", "exact"]
        yield f"### {dataset}\n\n{intro}\n\n{table(header, rows)}\n{note(members)}"


def file_tables(result):
    for dataset, _, members in groups(result["runs"]):
        rows = []
        for run in members:
            if run["status"] == "ok":
                o = run["objective"]
                accuracy = f"{100 * o['accuracy']:.2f} %" if "accuracy" in o else ""
                accounts = ["", "", ""]
                if "entropy_bytes" in o:
                    sums = o["entropy_bytes"] + o["codebook_bytes"] + o["lossless_bytes"]
                    accounts = [f"{o['entropy_bytes']:,.0f}", f"{sums:,.0f}", f"{100 * (o['bytes'] / sums - 1):+.2f} %"]
                rows.append([run["solver"], f"{o['bytes']:,}", f"{o['float32_bytes'] / o['bytes']:.2f}",
                             f"{o['relative_error']:.2e}", accuracy, *accounts])
        if rows:
            header = ["method", "bytes of the file", "times smaller", "relative squared error", "accuracy",
                      "order-0 entropy of the codes", "with codebooks and lossless tensors", "file against that"]
            yield f"### {dataset}\n\n{table(header, rows)}\n{note(members)}"


def memory_table(result):
    largest = result["largest_tensor_bytes"]
    rows = [[step, f"{r['peak_bytes'] / 1e6:.0f}", f"{r['start_bytes'] / 1e6:.0f}", f"{r['extra_bytes'] / largest:.2f}",
             f"{r['peak_bytes'] / largest:.2f}", f"{r['seconds']:.0f}"]
            for step, r in ((s, result[s]) for s in ("compress", "decompress"))]
    intro = (f"A file of {result['source_bytes'] / 1e6:.0f} MB whose largest tensor has {largest / 1e6:.0f} MB, "
             f"K = {result['settings']['n_clusters']}, {result['settings']['n_jobs']} job; the .skf file has "
             f"{result['file_bytes'] / 1e6:.0f} MB.")
    header = ["step", "peak MB", "of which imports MB", "(peak - imports) / largest tensor", "peak / largest tensor",
              "s"]
    yield f"{intro}\n\n{table(header, rows)}\n"


def decomposition_tables(result):
    for dataset, params, members in groups(result["runs"]):
        done = [r for r in members if r["status"] == "ok"]
        ours = next((r for r in done if r["solver"] == OURS), None)
        if ours is None:
            continue
        rows = [[r["solver"], seconds(r["wall_s"]), seconds(r["cpu_s"]), f"{r['objective']['relative_error']:.6f}",
                 *(f"{min(r[key]) / min(ours[key]):.3g}" for key in ("wall_s", "cpu_s"))] for r in done]
        header = ["solver", "wall s: best (median)", "CPU s: best (median)", "relative squared error",
                  "wall / skfactor's", "CPU / skfactor's"]
        yield f"### {dataset}, {params['method']}\n\n{table(header, rows)}\n{note(members)}"


SECTIONS = (
    ("kmeans_scalar", "Scalar k-means", kmeans_tables),
    ("kmeans_optimality", "Optimality of scalar k-means", optimality_table),
    ("kmeans_elbow", "Elbow curve", elbow_table),
    ("kmeans_rows", "One codebook per row", kmeans_tables),
    ("kmeans_vector", "Vector k-means", kmeans_tables),
    ("codec", "Entropy coders on the same codes", codec_tables),
    ("codec_files", "Whole networks, no calibration", file_tables),
    ("memory_1gb", "Memory, file to file", memory_table),
    ("decompositions", "Tensor decompositions", decomposition_tables),
)
INTRO = """# Benchmarks

Written by `examples/benchmarks/tables.py` from the JSON files of `examples/benchmarks/results/`; how to repeat them is
in `examples/benchmarks/README.md`. Every solver runs in a process of its own, all with the same number of threads.
Times count centroids, codes and reconstruction. Extra memory is the growth of the peak resident memory
during the first run, in units of the data. Times are of the machine named with each table, which other work shared: the
ratios side by side in one run say more than any time.
"""


REQUIREMENTS = """What the project asks of itself. A requirement of speed is judged by CPU time, best run against best
run, because the wall clock also counts what else the machine did. One in seconds whose work two threads share is judged
by the clock.
"""


def environment_line(result):
    e = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    threads = result["settings"].get("threads")
    used = "" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}; "
    return f"*{used}{e['cpu']}, {e['cores']} cores, {e['system']}, Python {e['python']}; {versions}.*\n"


def page(folder=RESULTS):
    """Text of docs/benchmarks.md."""
    parts, results = [], []
    for name, title, tables in SECTIONS:
        for path in sorted(folder.glob(f"{name}.json")) + sorted(folder.glob(f"{name}_[0-9]*t.json")):
            result = json.loads(path.read_text())
            results.append(result)
            threads = result["settings"].get("threads")
            suffix = f" ({threads} threads)" if threads and threads > 1 else " (1 thread)" if threads else ""
            parts += [f"## {title}{suffix}\n", result.get("description", "").strip() + "\n", environment_line(result)]
            parts += [f"*{text}*\n" for text in result.get("notes", [])]
            parts += list(tables(result))
    judged = table(["requirement", "measured", "verdict"], [list(row) for row in requirement_rows(results)])
    parts = [INTRO, "## Requirements\n", REQUIREMENTS, judged.replace("|---|---:|---:|", "|---|---|---|"), *parts]
    return "\n".join(part.rstrip() + "\n" for part in parts if part.strip())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    options.output.write_text(page(options.results))


if __name__ == "__main__":
    main()
