"""JSON Schema by the `jsonschema` package, with nothing fetched and nothing searched without an end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mlxtune.evaluate.checks.arguments import CheckError
from mlxtune.evaluate.checks.patterns import TOO_SLOW, TooSlow, compiled, found

ENDLESS = "refers to itself without an end, or is nested too deeply for the schema: counted as failed"
NO_FORMAT = "has `format`, which is not checked; `pattern` is"
DATA = ("enum", "const", "default", "examples")  # keywords whose values are no schemas


class Schema:
    """One JSON Schema. Raises CheckError for what is none, and for a $ref that leads out of it."""

    def __init__(self, schema: Any, notes: Counter[str]) -> None:
        import jsonschema
        from jsonschema_specifications import REGISTRY

        self.notes = notes
        dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            dialect.check_schema(schema)
        except jsonschema.SchemaError as error:
            path = "/".join(map(str, error.absolute_path))
            raise CheckError(f"not a JSON Schema: {error.message[:200]}" + (f" (at {path})" if path else "")) from error
        except RecursionError as error:
            raise CheckError("the schema is nested too deeply") from error
        self._patterns: dict[str, Any] = {}  # text -> compiled
        keys = set()
        for key, value in _keywords(schema):
            keys.add(key)
            self._look_at(key, value)
        if {"patternProperties", "unevaluatedProperties"} <= keys:
            raise CheckError("patternProperties and unevaluatedProperties in one schema are not supported")
        limited = jsonschema.validators.extend(
            dialect,
            {
                "pattern": self._pattern,
                "patternProperties": self._pattern_properties,
                "additionalProperties": self._additional_properties,
            },
        )
        # This registry holds the schemas of JSON Schema itself. The default one would fetch what a $ref names.
        self._validator = limited(schema, registry=REGISTRY)
        _check_references(schema, REGISTRY)

    def accepts(self, value: Any) -> bool:
        from referencing.exceptions import Unresolvable

        try:
            return bool(self._validator.is_valid(value))
        except TooSlow:
            self.notes[TOO_SLOW] += 1
        except RecursionError:
            self.notes[ENDLESS] += 1
        except Unresolvable as error:
            self.notes[f"needs the $ref {error.ref}, which is not in it: counted as failed"] += 1
        return False

    def _look_at(self, key: str, value: Any) -> None:
        """Compile the patterns of a schema, so that a wrong one is told before a model runs."""
        if key == "pattern" and isinstance(value, str):
            self._patterns[value] = compiled(value)
        elif key == "patternProperties" and isinstance(value, dict):
            self._patterns |= {pattern: compiled(pattern) for pattern in value}
        elif key == "format" and isinstance(value, str):
            self.notes[NO_FORMAT] += 0  # said whatever the answers are

    # The keywords that search by patterns, as the package has them, but with a time limit.

    def _pattern(self, validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
        from jsonschema import ValidationError

        if isinstance(value, str) and not found(self._patterns[pattern], value):
            yield ValidationError(f"does not match {pattern!r}")

    def _pattern_properties(self, validator: Any, schemas: dict[str, Any], value: Any, schema: Any) -> Iterator[Any]:
        if not isinstance(value, dict):
            return
        for pattern, inner in schemas.items():
            for key, item in value.items():
                if found(self._patterns[pattern], key):
                    yield from validator.descend(item, inner, path=key, schema_path=pattern)

    def _additional_properties(self, validator: Any, allowed: Any, value: Any, schema: Any) -> Iterator[Any]:
        if not isinstance(value, dict):
            return
        for key, item in value.items():
            patterns = schema.get("patternProperties", {})
            if key in schema.get("properties", {}) or any(found(self._patterns[one], key) for one in patterns):
                continue
            yield from validator.descend(item, allowed, path=key)


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """(keyword, value) of a schema and of those inside of it; what stands in data, as in `enum`, may look like one."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            for key, value in node.items():
                yield key, value
                if key not in DATA:
                    waiting.append(value)


def _check_references(schema: Any, registry: Any) -> None:
    """Raise CheckError for a $ref to another document, or to a part that is not there."""
    import referencing
    from referencing.jsonschema import DRAFT202012

    resource = referencing.Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = registry.resolver_with_root(resource)
    inner = [value for key, value in _keywords(schema) if key == "$id"]
    for key, value in _keywords(schema):
        if key not in ("$ref", "$dynamicRef") or not isinstance(value, str):
            continue
        try:
            resolver.lookup(value)
        except (referencing.exceptions.Unresolvable, ValueError) as error:
            if inner:  # parts with names of their own: what a $ref means depends on the part that it stands in
                continue
            raise CheckError(
                f"the schema's {key} {value[:80]!r} is not in it, and nothing is fetched",
                "Write that part under $defs, and refer to it as #/$defs/NAME.",
            ) from error
