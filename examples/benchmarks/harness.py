# SPDX-License-Identifier: BSD-3-Clause
"""A small benchmark harness: data sets, one objective and solvers as plug-ins, one JSON file out.

A benchmark is a script that makes a `Benchmark`, registers functions with it and calls `main`:

* a *data set* returns an array or a dict of arrays (``tiny=True`` asks for a size that takes milliseconds);
* a *solver* imports what it needs and returns ``run(data, **params)``; one whose import fails is reported as
  "not installed" and left out;
* the *objective* turns data and result into a few numbers, outside the measured time.

Every solver runs in a process of its own, so that libraries do not disturb one another: it imports, loads the
data, runs once on a few rows (just-in-time compilers, thread pools), and is then measured. A result of one solver
is ``result`` or ``(result, dict of further figures)``.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("skfactor", "numpy", "scipy", "scikit-learn", "torch", "constriction", "kmeans1d", "ckwrap",
             "flash1dkmeans", "numba", "faiss-cpu", "coremltools", "nncodec", "tensorly", "zstandard")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # a waiting OpenMP thread must not count as work on a busy machine


class Benchmark:
    """Data sets, solvers, objective and cases of one benchmark.

    Parameters
    ----------
    name : str
        First part of the name of the JSON file.
    description : str
    cases : list of dict
        Each with "dataset" and the parameters that solvers get.
    tiny_cases : list of dict
        The few that ``--tiny`` runs.
    warm_up : callable
        ``warm_up(data)`` is the small part of the data of the unmeasured first run; None for no such run.
    """

    def __init__(self, name, description, *, cases, tiny_cases, warm_up=None):
        self.name = name
        self.description = description
        self.cases = cases
        self.tiny_cases = tiny_cases
        self.warm_up = warm_up
        self.datasets = {}
        self.solvers = {}
        self.objective_function = None

    def dataset(self, function):
        """Register a data set under the name of its function."""
        self.datasets[function.__name__] = function
        return function

    def solver(self, name, *, skip=None):
        """Register a solver; `skip(data, params)` may return the reason for which a case is left out."""

        def register(function):
            self.solvers[name] = (function, skip)
            return function

        return register

    def objective(self, function):
        """Register ``function(data, result, **params) -> dict of numbers``."""
        self.objective_function = function
        return function

    # --- the parent process ---------------------------------------------------------------------

    def run(self, *, tiny=False, threads=2, repeat=5, budget=20.0, prefix="", solvers=None, datasets=None, echo=print):
        """Measure every solver on every case; returns the content of the JSON file."""
        runs = []
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for case in self.tiny_cases if tiny else self.cases:
                params = {k: v for k, v in case.items() if k != "dataset"}
                if datasets and case["dataset"] not in datasets:
                    continue
                for name in self.solvers:
                    if solvers and name not in solvers:
                        continue
                    path = self._data_file(files, folder, case["dataset"], tiny)
                    job = {"data": path, "params": params, "solver": name, "repeat": repeat, "budget": budget,
                           "threads": threads}
                    outcome = {"status": "skipped: data not found"} if path is None else self._measure(job, prefix)
                    runs.append({"dataset": case["dataset"], "params": params, "solver": name, **outcome})
                    echo(_one_line(runs[-1]))
        settings = {"threads": threads, "repeat": repeat, "budget_s": budget, "tiny": tiny}
        return {"benchmark": self.name, "description": self.description, "environment": environment(),
                "settings": settings, "runs": runs}

    def _data_file(self, files, folder, name, tiny):
        if name not in files:
            data = self.datasets[name](tiny)
            files[name] = None if data is None else os.path.join(folder, f"{name}.npz")
            if data is not None:
                np.savez(files[name], **(data if isinstance(data, dict) else {"": data}))
        return files[name]

    def _measure(self, job, prefix):
        script = sys.modules[self.objective_function.__module__].__file__
        variables = dict.fromkeys(_THREAD_VARIABLES, str(job["threads"])) | _PASSIVE
        command = [*shlex.split(prefix), sys.executable, script, "--one", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return {"status": f"failed: {last[:200]}"}
        return json.loads(lines[-1])

    # --- the measured process -------------------------------------------------------------------

    def _one(self, job):
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
        function, skip = self.solvers[job["solver"]]
        data, params = _load(job["data"]), job["params"]
        reason = skip(data, params) if skip else None
        if reason:
            return {"status": f"skipped: {reason}"}
        try:
            run = function()
        except ImportError as error:
            return {"status": "not installed", "missing": str(error.name)}
        if self.warm_up:
            run(self.warm_up(data), **params)
        walls, cpus, extra = [], [], None
        while len(walls) < job["repeat"] and sum(walls) < job["budget"]:
            gc.collect()
            start = _start_of_peak()
            wall, cpu = time.perf_counter(), time.process_time()
            result = run(data, **params)
            cpus.append(round(time.process_time() - cpu, 6))
            walls.append(round(time.perf_counter() - wall, 6))
            if extra is None and start is not None:
                extra = resident_memory("VmHWM") - start
        result, figures = result if isinstance(result, tuple) else (result, {})
        objective = {**self.objective_function(data, result, **params), **figures}
        return {"status": "ok", "wall_s": walls, "cpu_s": cpus, "extra_bytes": extra, "data_bytes": _nbytes(data),
                "objective": objective}

    def main(self, arguments=None):
        """Command line of a benchmark script."""
        parser = argparse.ArgumentParser(description=self.description)
        parser.add_argument("--tiny", action="store_true", help="small data, to see that everything runs")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--repeat", type=int, default=5, help="most runs of one measurement")
        parser.add_argument("--budget", type=float, default=20.0, help="seconds after which no further run starts")
        parser.add_argument("--solver", action="append", help="only this one; may be repeated")
        parser.add_argument("--dataset", action="append", help="only this one; may be repeated")
        parser.add_argument("--prefix", default="", help="command put before each measurement, a lock for example")
        parser.add_argument("--output", type=Path, default=None, help="default results/NAME_THREADSt.json")
        parser.add_argument("--one", help=argparse.SUPPRESS)
        options = parser.parse_args(arguments)
        if options.one:
            outcome = self._one(json.loads(options.one))
            print("\n" + json.dumps(outcome))
            return
        found = self.run(tiny=options.tiny, threads=options.threads, repeat=options.repeat, budget=options.budget,
                         prefix=options.prefix, solvers=options.solver, datasets=options.dataset)
        output = options.output or RESULTS / f"{self.name}_{options.threads}t.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n")


def environment():
    """CPU, Python and versions: what a reader needs to judge the figures, nothing that names a machine."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if versions["skfactor"] is None:
        import skfactor

        versions["skfactor"] = f"{skfactor.__version__} (checkout)"
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else
            os.cpu_count(), "system": platform.system(), "machine": platform.machine(),
            "python": platform.python_version(), "versions": versions}


def _cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _load(path):
    with np.load(path) as archive:
        names = archive.files
        return archive[""] if names == [""] else {name: archive[name] for name in names}


def _nbytes(data):
    return sum(a.nbytes for a in data.values()) if isinstance(data, dict) else data.nbytes


def resident_memory(field):
    """`VmRSS` or `VmHWM` (its peak) of this process in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _start_of_peak():
    """Resident memory now, after setting the recorded peak back to it (Linux; else the peak may be an older one)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_memory("VmRSS")


def _one_line(run):
    label = f"{run['dataset']:<12} {run['params']} {run['solver']:<34}"
    if run["status"] != "ok":
        return f"{label} {run['status']}"
    extra = "?" if run["extra_bytes"] is None else f"{run['extra_bytes'] / 1e6:.0f}"
    figures = "  ".join(f"{k} {v:.9g}" for k, v in run["objective"].items() if isinstance(v, int | float))
    return f"{label} wall {min(run['wall_s']):.4f} s  cpu {min(run['cpu_s']):.4f} s  +{extra} MB  {figures}"
