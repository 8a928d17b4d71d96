"""Rules: which estimator handles which tensor. Names in, decisions out; knows neither torch nor files."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from sklearn.pipeline import Pipeline

from skfactor.codec.tensor import Layout
from skfactor.estimators.base import steps_of

__all__ = ["Alias", "Plan", "TensorEntry", "check_compressor", "resolve_rules"]

#: Rule key of all parameters of at least two dimensions that belong to no known layer.
BARE = "parameters"
_ROLE_REASONS = {
    "bare": "bare parameter of no known layer: taken when a rule names it, or by the rule 'parameters'",
    "vector": "parameter of one dimension: taken when a rule names it",
    "buffer": "buffer: taken when a rule names it",
}


@dataclass(frozen=True)
class Alias:
    """One name of a tensor; a tied tensor has several.

    Attributes
    ----------
    name : str
        Dotted name in the state dict.
    types : tuple of type
        Class of the owning layer and its bases, most derived first; empty for tensors without a module.
    role : {"weight", "bare", "vector", "buffer"}
        A layer's weight is taken by every rule that matches; the others only when a rule names them.
    """

    name: str
    types: tuple[type, ...] = ()
    role: str = "weight"

    @property
    def owner(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a network, whatever the number of its names: what the rules and the report need to know.

    Attributes
    ----------
    aliases : tuple of Alias
        The first one's name is the tensor's name.
    unfit : str
        Why no estimator can ever take it (an integer tensor, an empty one); empty when one can.
    refusal : str
        Why it is an error that a rule takes it, with the remedy; empty otherwise.
    """

    aliases: tuple[Alias, ...]
    shape: tuple[int, ...]
    dtype: str
    layout: Layout | None = None
    unfit: str = ""
    refusal: str = ""

    @property
    def name(self) -> str:
        return self.aliases[0].name

    @property
    def lead(self) -> Alias:
        """The first alias that is a layer's weight, or the first of all."""
        return next((a for a in self.aliases if a.role == "weight"), self.aliases[0])

    @property
    def type_name(self) -> str:
        """Class of the owning module, 'buffer', or 'tensor' where there are no modules."""
        if self.lead.role == "buffer":
            return "buffer"
        return self.lead.types[0].__name__ if self.lead.types else "tensor"

    @property
    def label(self) -> str:
        """For messages: `layer 'conv2' (Conv2d 64x32x3x3)`."""
        lead = self.lead
        is_layer = lead.types and lead.role == "weight" and lead.name.endswith(".weight")
        who = f"layer {lead.owner!r}" if is_layer else f"tensor {lead.name!r}"
        return f"{who} ({self.type_name} {'x'.join(map(str, self.shape)) or 'scalar'})"


@dataclass(frozen=True)
class Plan:
    """Decisions by tensor name: the estimator (not yet cloned) of those taken, the reason of the others."""

    taken: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def check_compressor(value: Any, where: str) -> None:
    """TypeError unless `value` is an estimator or Pipeline that `fit` can be called on and that can be stored."""
    allowed = "an estimator of skfactor, a Pipeline of them, or None"
    if isinstance(value, type):
        raise TypeError(f"{where} must be {allowed}, got the class {value.__name__}: write {value.__name__}(...)")
    steps = steps_of(value) if isinstance(value, Pipeline) else [("", value)]
    if not steps:
        raise TypeError(f"{where} must be {allowed}, got a Pipeline of pass-throughs only")
    for name, step in steps:
        if all(callable(getattr(step, m, None)) for m in ("fit", "transform", "inverse_transform", "get_params")):
            continue
        got = f"step {name!r} of type {type(step).__name__}" if name else f"{step!r} of type {type(step).__name__}"
        raise TypeError(f"{where} must be {allowed}, got {got}")


def resolve_rules(rules: Any, entries: list[TensorEntry]) -> Plan:
    """Decide for every entry which rule takes it.

    The most specific rule wins: exact name, then name patterns (`fnmatch`) in the order given, then module type
    (nearest base class first), then the default "*". A rule that matches nothing, or whose every match is taken by a
    more specific one, is an error; so is a rule that takes an entry with a `refusal`.

    Parameters
    ----------
    rules : estimator, Pipeline or dict
        One compressor for every layer, or `{name, pattern, module type or "*": compressor or None}`.
    entries : list of TensorEntry

    Returns
    -------
    plan : Plan
    """
    rules = _as_mapping(rules)
    keys = [_Rule(key, position, entries) for position, key in enumerate(rules)]
    plan, won = Plan(), set()
    for entry in entries:
        if entry.unfit:
            plan.skipped[entry.name] = entry.unfit
            continue
        matches = sorted((rank, rule.position) for rule in keys if (rank := rule.rank(entry)) is not None)
        if not matches:
            plan.skipped[entry.name] = _ROLE_REASONS.get(_easiest_role(entry), "no rule matches it")
            continue
        _check_ties_agree(entry, matches, keys, rules)
        winner = keys[matches[0][1]]
        won.update(p for rank, p in matches if rank == matches[0][0] and rules[keys[p].key] is rules[winner.key])
        if rules[winner.key] is None:
            plan.skipped[entry.name] = f"rule {winner.label} is None"
        elif entry.refusal:
            raise_layer_error(entry, entry.refusal)
        else:
            plan.taken[entry.name] = rules[winner.key]
    for rule in keys:
        if rule.position not in won:
            _check_unused(rule, keys, entries)
    return plan


def raise_layer_error(entry: TensorEntry, message: str) -> None:
    """Raise the LayerError of an entry."""
    from skfactor.exceptions import LayerError

    raise LayerError(f"{entry.label}: {message}")


def _as_mapping(rules: Any) -> dict[Any, Any]:
    if not isinstance(rules, Mapping):
        check_compressor(rules, "rules")
        return {"*": rules}
    if not rules:
        raise ValueError("rules must hold at least one rule, got an empty dict")
    for key, value in rules.items():
        if not isinstance(key, (str, type)):
            raise TypeError(f"a rule's key must be a name, a pattern or a module type, got {key!r}")
        if value is not None:
            check_compressor(value, f"rule {_key_label(key)}")
    return dict(rules)


def _key_label(key: Any) -> str:
    return key.__name__ if isinstance(key, type) else repr(key)


def _is_glob(key: Any) -> bool:
    return isinstance(key, str) and any(c in key for c in "*?[")


class _Rule:
    """One key of the rules, classified once: exact name, glob pattern, type, bare parameters, or default."""

    def __init__(self, key: Any, position: int, entries: list[TensorEntry]):
        self.key, self.position = key, position
        self.label = _key_label(key)
        if key == "*":
            self.kind = "default"
        elif _is_glob(key):
            self.kind = "glob"
        elif isinstance(key, str) and any(key in (a.name, a.owner) for e in entries for a in e.aliases):
            self.kind = "exact"
        else:
            self.kind = "bare" if key == BARE else "type"
        self._names_matrices = self.kind == "glob" and any(
            a.role in ("weight", "bare") and self._names(a) for e in entries for a in e.aliases
        )

    def rank(self, entry: TensorEntry) -> tuple[int, int] | None:
        """How specific the match with an entry is (smaller is more specific), or None without a match."""
        return min(filter(None, map(self._rank_alias, entry.aliases)), default=None)

    def matches_name(self, alias: Alias) -> bool:
        """Whether the key matches a name at all, taken or not."""
        if self.kind == "type":
            return any(c is self.key or c.__name__ == self.key for c in alias.types)
        if self.kind == "exact":
            return self.key in (alias.name, alias.owner)
        return self.kind == "glob" and any(fnmatchcase(n, self.key) for n in (alias.name, alias.owner))

    def _rank_alias(self, alias: Alias) -> tuple[int, int] | None:
        if self.kind == "default":
            return (4, 0) if alias.role == "weight" else None
        if self.kind == "bare":
            return (3, 0) if alias.role == "bare" else None
        if not self.matches_name(alias) or not (alias.role == "weight" or self._takes_by_name(alias)):
            return None
        if self.kind == "type":
            return (2, next(i for i, c in enumerate(alias.types) if c is self.key or c.__name__ == self.key))
        if self.kind == "glob":
            return (1, self.position)
        return (0, 0 if self.key == alias.name else 1)

    def _names(self, alias: Alias) -> bool:
        """Whether a glob ends in the parameter's own name: `*.bias`, not `bn1.*`."""
        return fnmatchcase(alias.name, self.key) and self._ending_fits(alias)

    def _ending_fits(self, alias: Alias) -> bool:
        ending = self.key.rpartition(".")[2]
        own_name = alias.name.rpartition(".")[2]
        return any(c.isalnum() for c in ending) and fnmatchcase(own_name, ending)

    def _takes_by_name(self, alias: Alias) -> bool:
        """Whether a tensor that is no layer's weight is named explicitly.

        A glob that names matrices too (`*.weight`) means those: batch normalisation's `weight` needs its own.
        """
        if self.kind == "exact":
            return self.key == alias.name
        if self.kind != "glob" or not self._names(alias):
            return False
        return alias.role == "bare" or not self._names_matrices


def _easiest_role(entry: TensorEntry) -> str:
    order = ("weight", "bare", "vector", "buffer")
    return min((a.role for a in entry.aliases), key=order.index)


def _check_ties_agree(entry, matches, keys, rules) -> None:
    """Two names of one tied tensor, each with an exact rule of its own, must have the same rule."""
    (first, p), (second, q) = matches[0], matches[min(1, len(matches) - 1)]
    if first[0] == 0 and first == second and rules[keys[p].key] is not rules[keys[q].key]:
        names = ", ".join(a.name for a in entry.aliases)
        raise ValueError(f"rules {keys[p].label} and {keys[q].label} differ for one tied tensor ({names}): "
                         "give it one rule")


def _check_unused(rule: _Rule, keys: list[_Rule], entries: list[TensorEntry]) -> None:
    """ValueError for a rule that decided nothing; only a default may be left over."""
    if rule.kind == "default":
        if len(keys) > 1:
            return
        raise ValueError("nothing to compress: no tensor is the weight of a known layer; "
                         f"name parameters in the rules, or use the key {BARE!r}")
    ranked = [e for e in entries if not e.unfit and rule.rank(e) is not None]
    if ranked:
        others = [k for k in keys if k is not rule and k.rank(ranked[0]) is not None]
        winner = min(others, key=lambda k: (k.rank(ranked[0]), k.position))
        raise ValueError(f"rule {rule.label} is never used: every tensor it matches is taken by a more specific or "
                         f"earlier rule ({ranked[0].name} by {winner.label})")
    touched = [(e, a) for e in entries for a in e.aliases if rule.matches_name(a)]
    if touched:
        entry, alias = touched[0]
        why = entry.unfit or _ROLE_REASONS.get(alias.role, "it cannot be taken")
        raise ValueError(f"rule {rule.label} takes nothing: it matches only tensors that need another rule or none, "
                         f"such as {alias.name} ({why})")
    raise ValueError(f"rule {rule.label} matches no layer{_hint(rule, entries)}")


def _hint(rule: _Rule, entries: list[TensorEntry]) -> str:
    """What the user may have meant by a rule that matches nothing."""
    aliases = [a for e in entries for a in e.aliases]
    types = sorted({a.types[0].__name__ for a in aliases if a.types and a.role == "weight"})
    if isinstance(rule.key, type) or (rule.kind == "type" and rule.key[:1].isupper() and "." not in rule.key):
        if not any(a.types for a in aliases):
            return "; a state dict or a file has names only: rules by module type need the model itself"
        close = difflib.get_close_matches(rule.label.strip("'"), types, n=3, cutoff=0.5)
        return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; the types here: {', '.join(types)}"
    if rule.kind == "bare":
        return "; there is no parameter of two or more dimensions outside the known layers"
    if any(a.name.startswith(f"{rule.key}.") for a in aliases):
        return f"; did you mean {rule.key + '.*'!r}?"
    names = list(dict.fromkeys(n for a in aliases for n in (a.owner, a.name) if n))
    names += sorted({".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 1)} - set(names))
    plain = "".join(c for c in rule.key if c not in "*?[]").strip(".")
    close = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
    own = {n.rpartition(".")[2]: n for n in reversed(names)}
    close = close or [own[m] for m in difflib.get_close_matches(plain, own, n=3, cutoff=0.5)]
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; names look like {names[0]!r}" if names else ""
