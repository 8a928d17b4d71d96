"""The command line: exit codes, one line per error, clean JSON, no torch."""
# SPDX-License-Identifier: BSD-3-Clause

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.pipeline import Pipeline

import skfactor.estimators
from skfactor import KMeansWeightSharer, __version__
from skfactor.cli import DEFAULT_RULE, METHODS, UsageError, estimator_from_text, main, rules_from_text
from skfactor.estimators import BaseCompressor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.laplace(size=(8, 3, 3, 3)).astype(np.float32),
        "fc.weight": rng.normal(size=(10, 40)).astype(np.float32),
        "fc.half": rng.normal(size=(6, 30)).astype(np.float16),
        "fc.bias": rng.normal(size=10).astype(np.float32),
        "steps": np.array(7, dtype=np.int64),
    }


@pytest.fixture
def source(tmp_path, tensors):
    path = tmp_path / "in.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def packed(tmp_path, source, capsys):
    path = tmp_path / "in.skf"
    assert main(["compress", str(source), "-o", str(path)]) == 0
    capsys.readouterr()
    return path


def call(*args, check=False, **kwargs):
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | kwargs.pop("env", {})
    return subprocess.run([sys.executable, "-m", "skfactor.cli", *map(str, args)], capture_output=True, text=True,
                          check=check, env=environment, **kwargs)


def test_compress_writes_what_the_rule_says(tmp_path, source, tensors, capsys):
    out = tmp_path / "out.skf"
    rules = ["--rule", "*=kmeans:n_clusters=4", "--rule", "fc.weight=none"]
    assert main(["compress", str(source), "-o", str(out), *rules]) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert f"{out.stat().st_size:,}" in printed.out
    back = tmp_path / "back.safetensors"
    assert main(["decompress", str(out), "-o", str(back)]) == 0
    restored = load_file(back)
    assert restored.keys() == tensors.keys()
    for name, array in tensors.items():
        assert restored[name].dtype == array.dtype
        assert restored[name].shape == array.shape
        if name in ("fc.weight", "fc.bias", "steps"):
            assert restored[name].tobytes() == array.tobytes()
    W = tensors["conv1.weight"].reshape(8, -1)
    sharer = KMeansWeightSharer(n_clusters=4).fit(W)
    expected = sharer.inverse_transform(sharer.transform(W)).reshape(8, 3, 3, 3)
    np.testing.assert_array_equal(restored["conv1.weight"], expected)
    assert len(np.unique(restored["fc.half"])) <= 4


def test_default_rule_is_what_the_help_says(tmp_path, source, packed):
    explicit = tmp_path / "explicit.skf"
    assert main(["compress", str(source), "-o", str(explicit), "--rule", DEFAULT_RULE]) == 0
    assert explicit.read_bytes() == packed.read_bytes()
    assert DEFAULT_RULE in call("compress", "--help").stdout


def test_recipe_is_the_same_as_rules(tmp_path, source):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\npattern = "fc.*"\nestimator = "kmeans"\nn_clusters = 4\ngranularity = "row"\n'
                      '[[rule]]\npattern = "*"\nestimator = "kmeans:n_clusters=3"\n'
                      '[[rule]]\npattern = "conv1.weight"\nestimator = "none"\n')
    a, b = tmp_path / "a.skf", tmp_path / "b.skf"
    assert main(["compress", str(source), "-o", str(a), "--recipe", str(recipe)]) == 0
    rules = ["fc.*=kmeans:n_clusters=4,granularity=row", "*=kmeans:n_clusters=3", "conv1.weight=none"]
    assert main(["compress", str(source), "-o", str(b), *(x for r in rules for x in ("--rule", r))]) == 0
    assert a.read_bytes() == b.read_bytes()


def test_rule_of_the_command_line_goes_before_the_recipe(tmp_path, source):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\npattern = "*"\nestimator = "kmeans"\nn_clusters = 4\n')
    a, b = tmp_path / "a.skf", tmp_path / "b.skf"
    rule = ["--rule", "*=kmeans:n_clusters=2"]
    assert main(["compress", str(source), "-o", str(a), "--recipe", str(recipe), *rule]) == 0
    assert main(["compress", str(source), "-o", str(b), *rule]) == 0
    assert a.read_bytes() == b.read_bytes()


def test_result_does_not_depend_on_jobs(tmp_path, source, packed):
    parallel = tmp_path / "parallel.skf"
    assert main(["compress", str(source), "-o", str(parallel), "--jobs", "2"]) == 0
    assert parallel.read_bytes() == packed.read_bytes()


def test_output_is_kept_without_force(source, packed, capsys):
    before = packed.read_bytes()
    assert main(["compress", str(source), "-o", str(packed), "--rule", "*=kmeans:n_clusters=2"]) == 2
    assert "--force" in capsys.readouterr().err
    assert packed.read_bytes() == before
    assert main(["compress", str(source), "-o", str(packed), "--rule", "*=kmeans:n_clusters=2", "--force"]) == 0
    assert packed.read_bytes() != before


@pytest.mark.parametrize("which", ["source", "packed"])
def test_inspect_json_sums_to_the_file(which, request, capsys):
    path = request.getfixturevalue(which)
    assert main(["inspect", str(path), "--json"]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert printed.err == ""
    stored = sum(tensor["bytes_after"] for tensor in figures["tensors"]) + figures["overhead_bytes"]
    assert stored == path.stat().st_size == figures["total"]["bytes_after"]


def test_compress_json_is_clean(tmp_path, source):
    done = call("compress", source, "-o", tmp_path / "out.skf", "--json", "--rule", "*=kmeans:n_clusters=4", check=True)
    assert json.loads(done.stdout)["total"]["bytes_after"] == (tmp_path / "out.skf").stat().st_size


def test_compare(source, packed, tensors, capsys):
    assert main(["compare", str(source), str(packed), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    by_name = {tensor["name"]: tensor for tensor in figures["tensors"]}
    assert by_name.keys() == tensors.keys()
    assert by_name["fc.bias"]["identical"]
    assert not by_name["conv1.weight"]["identical"]
    assert main(["compare", str(source), str(packed)]) == 0
    assert "conv1.weight" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["inspect"], ["compress", "-o", "out.skf"], ["compare", "in.skf"],
                                     ["decompress", "-o", "out.safetensors"]])
def test_files_need_no_torch(tmp_path, source, packed, command):
    name = packed.name if command[0] in ("decompress", "compare") else source.name
    code = (f"import sys; from skfactor.cli import main; code = main({[*command, name]!r}); "
            "assert code == 0, code; assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"skfactor {__version__}\n"
    for command in ([], ["demo"], ["compress"], ["inspect"], ["decompress"], ["compare"]):
        assert main([*command, "--help"]) == 0
        assert "usage: skfactor" in capsys.readouterr().out


WRONG_USE = {
    "no command": ([], "COMMAND"),
    "unknown command": (["inspct", "{source}"], "inspct"),
    "no output": (["compress", "{source}"], "-o/--output"),
    "unknown option": (["inspect", "{source}", "--jsno"], "--jsno"),
    "missing input": (["inspect", "nowhere.skf"], "nowhere.skf does not exist"),
    "folder as input": (["inspect", "{folder}"], "is a folder"),
    "no folder for the output": (["compress", "{source}", "-o", "{folder}/no/out.skf"], "does not exist"),
    "output is a folder": (["compress", "{source}", "-o", "{folder}"], "is a folder"),
    "output is the input": (["compress", "{source}", "-o", "{source}", "--force"], "is the input itself"),
    "compressed already": (["compress", "{packed}", "-o", "{out}"], "is compressed already"),
    "no method": (["compress", "{source}", "-o", "{out}", "--rule", "*"], "PATTERN=METHOD"),
    "unknown method": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmean"], "did you mean 'kmeans'"),
    "unknown parameter": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans:n_cluster=4"],
                          "did you mean 'n_clusters'"),
    "wrong value": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans:n_clusters=0"], "n_clusters"),
    "wrong type": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans:n_clusters=many"], "'many'"),
    "wrong choice": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans:granularity=rows"], "granularity"),
    "no value": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans:n_clusters"], "name=value"),
    "parameter twice": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans:tol=1,tol=2"], "given twice"),
    "pattern twice": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans", "--rule", "*=none"], "two rules"),
    "no jobs": (["compress", "{source}", "-o", "{out}", "--jobs", "0"], "--jobs"),
    "no recipe": (["compress", "{source}", "-o", "{out}", "--recipe", "nowhere.toml"], "nowhere.toml does not exist"),
    "rule matches nothing": (["compress", "{source}", "-o", "{out}", "--rule", "conv2.weight=kmeans"],
                             "did you mean 'conv1.weight'"),
    "seed": (["demo", "--seed", "-1"], "--seed"),
}
FAILS = {
    "layer fails": (["compress", "{source}", "-o", "{out}", "--rule", "*=kmeans:vector_size=7"], "vector_size"),
    "not a file of tensors": (["inspect", "{text}"], "text.txt"),
    "damaged file": (["decompress", "{damaged}", "-o", "{out}"], "damaged.skf"),
    "safetensors to decompress": (["decompress", "{source}", "-o", "{out}"], "in.safetensors"),
}


@pytest.mark.parametrize(("case", "code"), [(c, 2) for c in WRONG_USE.values()] + [(c, 1) for c in FAILS.values()],
                         ids=[*WRONG_USE, *FAILS])
def test_errors_are_one_line_on_stderr(tmp_path, source, packed, case, code, capsys):
    (tmp_path / "text.txt").write_text("no tensors here")
    data = bytearray(packed.read_bytes())
    data[-40] ^= 255
    (tmp_path / "damaged.skf").write_bytes(data)
    places = {"source": source, "packed": packed, "folder": tmp_path, "out": tmp_path / "out.skf",
              "text": tmp_path / "text.txt", "damaged": tmp_path / "damaged.skf"}
    arguments, message = case
    assert main([argument.format(**places) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("skfactor: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not (tmp_path / "out.skf").exists()


@pytest.mark.parametrize(("text", "message"), [
    ('rule = 3', "[[rule]] tables"),
    ('[[rule]]\nestimator = "kmeans"', 'rule 1: pattern = "..." is missing'),
    ('[[rule]]\npattern = "*"', 'rule 1: estimator = "..." is missing'),
    ('[[rule]]\npattern = "*"\nestimator = "kmeans"\nk = 3', "no parameter 'k'"),
    ('[[rule]]\npattern = "*"\nestimator = "none"\nk = 3', "belong inside its text"),
    ('[[rules]]\npattern = "*"\nestimator = "none"', "rules"),
    ('[[rule', "no valid TOML"),
])
def test_wrong_recipe(tmp_path, source, text, message, capsys):
    (tmp_path / "r.toml").write_text(text)
    assert main(["compress", str(source), "-o", str(tmp_path / "o.skf"), "--recipe", str(tmp_path / "r.toml")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_warnings_are_one_line(tmp_path, capsys):
    save_file({"w": np.float32([[1, 2], [1, 2]])}, tmp_path / "few.safetensors")
    assert main(["compress", str(tmp_path / "few.safetensors"), "-o", str(tmp_path / "few.skf")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert any(line.startswith("skfactor: warning: ") and "distinct" in line for line in lines)


def test_unforeseen_error_is_one_line(monkeypatch, source, capsys):
    def fail(*_, **__):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("skfactor.report.Report.from_file", fail)
    assert main(["inspect", str(source)]) == 1
    assert capsys.readouterr().err == "skfactor: error: RuntimeError: first second\n"
    monkeypatch.setenv("SKFACTOR_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["inspect", str(source)])


def test_interrupt(monkeypatch, source, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("skfactor.report.Report.from_file", interrupt)
    assert main(["inspect", str(source)]) == 130
    assert capsys.readouterr().err == "skfactor: error: interrupted\n"


def test_reader_that_leaves_is_no_error(source):
    command = [sys.executable, "-m", "skfactor.cli", "inspect", str(source)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_terminal_without_greek_gets_its_table(packed):
    done = call("inspect", packed, env={"PYTHONIOENCODING": "ascii"}, check=True)
    assert "conv1.weight" in done.stdout


def test_pipeline_of_methods(monkeypatch):
    monkeypatch.setitem(METHODS, "again", "KMeansWeightSharer")
    pipeline = estimator_from_text("kmeans:n_clusters=8|again:n_clusters=2,granularity=row")
    assert isinstance(pipeline, Pipeline)
    assert list(pipeline.named_steps) == ["kmeans", "again"]
    assert pipeline.get_params()["kmeans__n_clusters"] == 8
    assert pipeline.get_params()["again__granularity"] == "row"
    assert list(estimator_from_text("kmeans|kmeans").named_steps) == ["kmeans1", "kmeans2"]


@pytest.mark.parametrize(("text", "value"), [
    ("tol=1e-3", 1e-3), ("preserve_zeros=true", True), ("preserve_zeros=False", False), ("group_size=none", None),
    ("random_state=3", 3), ("init='linear'", "linear"), ("init=linear", "linear"),
])
def test_values_of_parameters(text, value):
    got = estimator_from_text(f"kmeans:{text}").get_params()[text.partition("=")[0]]
    assert got == value
    assert type(got) is type(value)


def test_equals_sign_and_spaces_in_rules():
    rules = rules_from_text([" fc.* = kmeans : n_clusters = 4 , init = linear ", "conv*=NONE"])
    assert rules["fc.*"].get_params()["n_clusters"] == 4
    assert rules["conv*"] is None
    with pytest.raises(UsageError, match="PATTERN=METHOD"):
        rules_from_text(["=kmeans"])


def test_every_estimator_has_a_name_on_the_command_line():
    public = (getattr(skfactor.estimators, name) for name in skfactor.estimators.__all__)
    classes = {c.__name__ for c in public if inspect.isclass(c) and issubclass(c, BaseCompressor)}
    assert classes - {"BaseCompressor"} == set(METHODS.values())
