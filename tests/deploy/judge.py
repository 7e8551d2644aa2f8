"""Judges a document as an API server with strict field validation would by a CRD's schema; without its CEL rules.

judge.py CRD VERSION < documents: an array with, for each document, what is wrong and where; empty if nothing is.
"""

import json
import sys

import jsonschema
import yaml


def strict(schema):
    """An object has the properties that are named, unless others are asked for."""
    if schema.get("type") == "object" and "additionalProperties" not in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    for child in list(schema.get("properties", {}).values()):
        strict(child)
    for key in ("additionalProperties", "items"):
        if isinstance(schema.get(key), dict):
            strict(schema[key])
    return schema


crd = yaml.safe_load(open(sys.argv[1]))
version = next(v for v in crd["spec"]["versions"] if v["name"] == sys.argv[2])
schema = strict(version["schema"]["openAPIV3Schema"])
for server_side in ("apiVersion", "kind", "metadata"):
    schema["properties"][server_side] = {}
validator = jsonschema.Draft202012Validator(schema)
said = []
for document in yaml.safe_load_all(sys.stdin):
    errors = validator.iter_errors(document)
    said.append("; ".join(f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors))
print(json.dumps(said))
