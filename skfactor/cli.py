"""Command line `skfactor`: parses arguments, calls the library, and turns every error into one line.

Files go in and out without the network's Python class and without torch, except for `skfactor demo`.
"""
# SPDX-License-Identifier: BSD-3-Clause

import argparse
import ast
import json
import os
import sys
import tomllib
import warnings
from pathlib import Path

from skfactor import __version__
from skfactor.exceptions import SkfactorError

__all__ = ["estimator_from_text", "main", "rules_from_recipe", "rules_from_text"]

DEFAULT_RULE = "*=kmeans:n_clusters=32"

#: name in a rule -> class in `skfactor.estimators`; a new estimator is one more line
METHODS = {
    "autoencoder": "AutoencoderCompressor",
    "blockterm": "BlockTermFactorizer",
    "coupled": "CoupledCPDFactorizer",
    "deepkmeans": "DeepKMeansRegularizer",
    "dictionary": "DictionaryFactorizer",
    "htucker": "HierarchicalTuckerFactorizer",
    "cp": "CPDFilterPruner",
    "kmeans": "KMeansWeightSharer",
    "lowrank": "LowRankFactorizer",
    "prune": "MagnitudePruner",
    "round": "MantissaRounder",
    "separable": "SeparableFactorizer",
    "soft": "SoftWeightSharer",
    "train": "TensorTrainFactorizer",
    "tucker": "TuckerFactorizer",
    "uniform": "UniformQuantizer",
}

_EPILOG = """\
examples:
  skfactor demo
  skfactor compress model.safetensors -o model.skf
  skfactor compress model.safetensors -o model.skf --rule '*=kmeans:n_clusters=16' --rule 'lm_head*=none'
  skfactor inspect model.skf
  skfactor compare model.safetensors model.skf
  skfactor decompress model.skf -o restored.safetensors

exit codes: 0 done, 1 failed, 2 wrong use; an error is one line on stderr (SKFACTOR_TRACEBACK=1 shows where)
"""

_COMPRESS_EPILOG = """\
rules:
  PATTERN=METHOD        tensors whose name matches the shell pattern; the most specific rule wins, then the first
  PATTERN=none          keep them as they are, losslessly; so is every tensor that no rule takes
  METHOD                kmeans, uniform or round, with parameters as kmeans:n_clusters=16,granularity=row
  METHOD1|METHOD2       one after the other, a pipeline: the second compresses the codes of the first
  '*' takes every matrix and convolution; biases and other vectors are taken only by a rule that names them

examples:
  skfactor compress in.safetensors -o out.skf
  skfactor compress in.safetensors -o out.skf --rule '*=kmeans:n_clusters=64,entropy_weight=1e-4'
  skfactor compress in.safetensors -o out.skf --recipe recipe.toml

recipe.toml:
  [[rule]]
  pattern = "layer1.*"
  estimator = "kmeans"
  n_clusters = 16
"""


class UsageError(Exception):
    """The command line asks for something that cannot be meant: exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see '{self.prog} --help')")


# ---------------------------------------------------------------------------------------------------------------------
# rules in words
# ---------------------------------------------------------------------------------------------------------------------


def _estimator_class(name):
    """Class of a method's name; UsageError with the allowed names otherwise."""
    from skfactor import estimators
    from skfactor._validation import did_you_mean

    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}{did_you_mean(name, METHODS) or ';'} "
                         f"allowed: {', '.join(sorted(METHODS))}, none")
    return getattr(estimators, METHODS[name])


def _split_outside_brackets(text, separator):
    """Parts of `text` between separators that stand in no bracket: 'a=1,b=(2,3)' -> ['a=1', 'b=(2,3)']."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _value_from_text(text):
    """A parameter's value: number, true/false, none, tuple or list; anything else is a string."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _make_estimator(name, params):
    """One estimator from its short name and parameters, all of them checked."""
    from skfactor._validation import did_you_mean

    estimator = _estimator_class(name)()
    allowed = sorted(estimator.get_params(deep=False))
    for key in params:
        if key not in allowed:
            raise UsageError(f"{name} has no parameter {key!r}{did_you_mean(key, allowed) or ';'} "
                             f"allowed: {', '.join(allowed)}")
    try:
        estimator.set_params(**params)._validate_params()
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    return estimator


def estimator_from_text(text):
    """Estimator, Pipeline or None (lossless) that a rule's right side asks for.

    Parameters
    ----------
    text : str
        `name`, `name:parameter=value,...`, several of these joined by `|`, or `none`.

    Raises
    ------
    UsageError
        For an unknown name or parameter and for a value that the estimator does not allow.

    Examples
    --------
    >>> from skfactor.cli import estimator_from_text
    >>> estimator_from_text("kmeans:n_clusters=4,granularity=row")
    KMeansWeightSharer(granularity='row', n_clusters=4)
    """
    if text.strip().lower() == "none":
        return None
    steps = []
    for step in _split_outside_brackets(text, "|"):
        name, _, arguments = step.partition(":")
        steps.append((name.strip(), _make_estimator(name.strip(), _params_from_text(arguments))))
    return _joined(steps)


def _params_from_text(text):
    params = {}
    for part in _split_outside_brackets(text, ",") if text.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise UsageError(f"parameters are written name=value,name=value, got {part!r}")
        if key in params:
            raise UsageError(f"parameter {key!r} is given twice")
        params[key] = _value_from_text(value)
    return params


def _joined(steps):
    """The only step, or a Pipeline whose steps carry the short names, numbered where one occurs twice."""
    if len(steps) == 1:
        return steps[0][1]
    from sklearn.pipeline import Pipeline

    names = [name for name, _ in steps]
    return Pipeline([(name if names.count(name) == 1 else f"{name}{i + 1}", step)
                     for i, (name, step) in enumerate(steps)])


def rules_from_text(texts):
    """Rules `{pattern: estimator}` from texts `PATTERN=METHOD`.

    >>> from skfactor.cli import rules_from_text
    >>> rules_from_text(["*=kmeans:n_clusters=8", "fc*=none"])
    {'*': KMeansWeightSharer(n_clusters=8), 'fc*': None}
    """
    rules = {}
    for text in texts:
        pattern, equals, method = (piece.strip() for piece in text.partition("="))
        if not (pattern and equals and method):
            raise UsageError(f"a rule is written PATTERN=METHOD, for example {DEFAULT_RULE!r}, got {text!r}")
        if pattern in rules:
            raise UsageError(f"pattern {pattern!r} has two rules; give it one")
        rules[pattern] = estimator_from_text(method)
    return rules


def rules_from_recipe(path):
    """Rules of a TOML file of `[[rule]]` tables, each with `pattern`, `estimator` and the estimator's parameters."""
    try:
        recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"recipe {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is no valid TOML: {error}") from error
    tables = recipe.pop("rule", None)
    if recipe or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"recipe {path} must consist of [[rule]] tables"
                         + (f", got also {', '.join(sorted(recipe))}" if recipe else ""))
    rules = {}
    for number, table in enumerate(tables, 1):
        try:
            pattern, estimator = _rule_from_table(dict(table))
            if pattern in rules:
                raise UsageError(f"pattern {pattern!r} has two rules; give it one")
        except UsageError as error:
            raise UsageError(f"recipe {path}, rule {number}: {error}") from None
        rules[pattern] = estimator
    return rules


def _rule_from_table(table):
    for key in ("pattern", "estimator"):
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise UsageError(f"{key} = \"...\" is missing")
    pattern, text, params = table.pop("pattern").strip(), table.pop("estimator").strip(), table
    if not params:
        return pattern, estimator_from_text(text)
    if text.lower() == "none" or set(":|") & set(text):
        raise UsageError(f"parameters of estimator = {text!r} belong inside its text, got also {', '.join(params)}")
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    return pattern, _make_estimator(text, params)


# ---------------------------------------------------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------------------------------------------------


def _check_paths(source, target, force):
    """Refuse before any work: a missing input, an output that exists, or one that is the input."""
    _check_exists(source)
    target = Path(target)
    if not target.parent.is_dir():
        raise UsageError(f"folder {target.parent} of the output does not exist")
    if target.is_dir():
        raise UsageError(f"output {target} is a folder")
    if target.exists() and os.path.samefile(source, target):
        raise UsageError(f"output {target} is the input itself")
    if target.exists() and not force:
        raise UsageError(f"output {target} exists; --force overwrites it")


def _check_exists(path):
    if not Path(path).exists():
        raise UsageError(f"file {path} does not exist")
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder, not a file")


def _print_json(figures):
    print(json.dumps(figures, indent=2, allow_nan=False))


def _compress(args):
    _check_paths(args.input, args.output, args.force)
    # the first of equally specific rules wins, so those of the command line come before the recipe's
    rules = rules_from_text(args.rule)
    if args.recipe:
        rules |= {k: v for k, v in rules_from_recipe(args.recipe).items() if k not in rules}
    from skfactor.bridge.files import compress_file
    from skfactor.report import Report, is_skf, naming_file

    if is_skf(args.input):
        raise UsageError(f"{args.input} is compressed already; decompress it first")
    rules = rules or rules_from_text([DEFAULT_RULE])
    with naming_file(args.input):
        try:
            result = compress_file(args.input, args.output, rules, calibration=args.calibration, n_jobs=args.jobs,
                                   progress=not args.json)
        except SkfactorError:
            raise
        except ValueError as error:  # of the rules: one that matches nothing, for example
            raise UsageError(str(error)) from error
    report = Report.from_file(args.output, original=args.input, records=result.records)
    if args.json:
        _print_json(report.to_dict())
    else:
        print(report)


def _decompress(args):
    _check_paths(args.input, args.output, args.force)
    from skfactor.bridge.files import decompress_file
    from skfactor.report import naming_file

    with naming_file(args.input):
        decompress_file(args.input, args.output)
    print(f"{args.output}: {os.path.getsize(args.output):,} bytes")


def _inspect(args):
    _check_exists(args.file)
    if args.original:
        _check_exists(args.original)
    from skfactor.report import Report

    report = Report.from_file(args.file, original=args.original, detail=args.detail)
    if args.json:
        _print_json(report.to_dict())
    else:
        print(report)


def _compare(args):
    _check_exists(args.a)
    _check_exists(args.b)
    from skfactor.report import compare

    comparison = compare(args.a, args.b)
    if args.json:
        _print_json(comparison.to_dict())
    else:
        print(comparison)


def _demo(args):
    from skfactor.demo import FULL, QUICK, run

    run(args.out, effort=QUICK if args.quick else FULL, seed=args.seed)


# ---------------------------------------------------------------------------------------------------------------------
# arguments
# ---------------------------------------------------------------------------------------------------------------------


def _count(text):
    number = int(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be a number of processes, or -1 for all cores, got 0")
    return number


def _seed(text):
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must be in 0..{2**32 - 1}, got {number}")
    return number


_count.__name__ = _seed.__name__ = "integer"  # argparse's message names the type so


def _parser():
    parser = _Parser(
        prog="skfactor", description="Small files from trained networks, and back.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"skfactor {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, function, summary, epilog=None):
        added = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )
        added.set_defaults(function=function)
        return added

    demo = command("demo", _demo, "train a small network, compress it, and show what came of it")
    demo.add_argument("--out", metavar="FOLDER", default="skfactor-demo", help="folder to write to (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="fewer epochs and settings: some seconds, less accuracy")
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the training (%(default)s)")

    compress = command("compress", _compress, "compress a .safetensors file", _COMPRESS_EPILOG)
    compress.add_argument("input", metavar="IN", help=".safetensors file")
    compress.add_argument("-o", "--output", metavar="OUT", required=True, help=".skf file to write")
    compress.add_argument("--rule", metavar="PATTERN=METHOD", action="append", default=[],
                          help=f"may be given several times; without any rule '{DEFAULT_RULE}'".replace("%", "%%"))
    compress.add_argument("--recipe", metavar="FILE", help="rules in a TOML file; those of --rule come first")
    compress.add_argument("--calibration", choices=["assumed"],
                          help="choose codes for the outputs of layers, with inputs assumed from the shapes of kernels")
    compress.add_argument("--jobs", metavar="N", type=_count, help="tensors compressed at once, -1 for all cores")
    compress.add_argument("--force", action="store_true", help="overwrite OUT")
    compress.add_argument("--json", action="store_true", help="print the report as JSON")

    inspect = command("inspect", _inspect, "show what a .skf or .safetensors file holds, tensor by tensor")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--original", metavar="FILE", help="uncompressed file, for the relative errors")
    inspect.add_argument("--detail", action="store_true",
                         help="also fixed-length, Huffman and entropy sizes of the codes (takes longer)")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    decompress = command("decompress", _decompress, "write a .skf file out as .safetensors")
    decompress.add_argument("input", metavar="FILE", help=".skf file")
    decompress.add_argument("-o", "--output", metavar="OUT", required=True, help=".safetensors file to write")
    decompress.add_argument("--force", action="store_true", help="overwrite OUT")

    compare = command("compare", _compare, "compare the tensors of two files (.skf or .safetensors)")
    compare.add_argument("a", metavar="A")
    compare.add_argument("b", metavar="B")
    compare.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _say(kind, message):
    """One line on stderr, whatever the message looks like."""
    print(f"skfactor: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _run(argv):
    """Parse and execute; returns the exit code of success and raises everything else."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as done:  # --help and --version
        return done.code or 0
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say("warning", message)
        args.function(args)
    sys.stdout.flush()
    return 0


def main(argv=None):
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str or None, default=None
        Arguments; those of the process when None.

    Returns
    -------
    int
        0 done, 1 failed, 2 wrong use, 130 interrupted. Errors are one line on stderr.

    Examples
    --------
    >>> from skfactor.cli import main
    >>> main(["--version"])
    skfactor ...
    0
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without κ still gets its table
    try:
        return _run(argv)
    except UsageError as error:
        _say("error", error)
        return 2
    except KeyboardInterrupt:
        _say("error", "interrupted")
        return 130
    except BrokenPipeError:
        # the reader of our output left; a second complaint at interpreter exit is avoided
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("SKFACTOR_TRACEBACK"):
            raise
        _say("error", _described(error))
        return 1


def _described(error):
    """The error's own message where it is written for users, else with its type."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, ImportError)) and str(error):
        return error
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
