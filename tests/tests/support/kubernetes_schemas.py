"""Holds objects against the schemas of one version of Kubernetes.

Usage: kubernetes_schemas.py WHEEL < OBJECTS

WHEEL is the Python client of that version, whose models are made from its published OpenAPI. OBJECTS is a JSON list; what is of no
kind of Kubernetes' own is passed over. Prints the number of objects looked at, and each mistake on a line of its own.
"""

import json
import re
import sys
import zipfile

SCALARS = {"str": str, "datetime": str, "int": int, "float": (int, float), "bool": bool}


class Model:
    """One type: its fields as JSON names them, with their types, and which must be there."""

    def __init__(self, text):
        def table(name):
            return dict(re.findall(r"'(\w+)': '([^']+)'", re.search(name + r" = \{(.*?)\}", text, re.DOTALL)[1]))

        names = table("attribute_map")
        self.fields = {names[field]: of for field, of in table("openapi_types").items()}
        setters = [setter for setter in text.split(".setter\n")[1:] if "must not be `None`" in setter]
        self.required = {names[re.search(r"def (\w+)\(self", setter)[1]] for setter in setters}


class Schemas:
    def __init__(self, path):
        wheel = zipfile.ZipFile(path)
        self.texts = {}
        for name in wheel.namelist():
            if name.startswith("kubernetes/client/models/"):
                text = wheel.read(name).decode()
                found = re.search(r"^class (\w+)\(", text, re.MULTILINE)
                if found:
                    self.texts[found[1]] = text
        self.models = {}

    def model(self, name):
        if name not in self.models:
            self.models[name] = Model(self.texts[name])
        return self.models[name]

    def of(self, item):
        """The type of an object, if it is one of Kubernetes' own."""
        group, _, version = item["apiVersion"].rpartition("/")
        if "." in group and not group.endswith(".k8s.io") or group.endswith("gateway.networking.k8s.io"):
            return None
        return version[0].upper() + version[1:] + item["kind"]

    def check(self, of, value, path):
        """Yields what is wrong with a value."""
        listed = re.fullmatch(r"list\[(.+)\]", of)
        mapped = re.fullmatch(r"dict[(\[]str, (.+)[)\]]", of)
        if of == "object":
            return
        if of in SCALARS:
            if not isinstance(value, SCALARS[of]) or isinstance(value, bool) != (of == "bool"):
                yield f"{path}: {value!r} is no {of}"
        elif listed:
            if not isinstance(value, list):
                yield f"{path}: {value!r} is no list"
                return
            for at, each in enumerate(value):
                yield from self.check(listed[1], each, f"{path}[{at}]")
        elif not isinstance(value, dict):
            yield f"{path}: {value!r} is no object"
        elif mapped:
            for key, each in value.items():
                yield from self.check(mapped[1], each, f"{path}[{key}]")
        else:
            yield from self.check_model(self.model(of), value, path)

    def check_model(self, model, value, path):
        for missing in sorted(model.required - value.keys()):
            yield f"{path}: no {missing}"
        for key, each in value.items():
            if key not in model.fields:
                yield f"{path}: no such field: {key}"
                continue
            yield from self.check(model.fields[key], each, f"{path}.{key}")


def main():
    schemas = Schemas(sys.argv[1])
    looked_at = 0
    mistakes = []
    for item in json.load(sys.stdin):
        of = schemas.of(item)
        if of is None:
            continue
        looked_at += 1
        name = f"{item['kind']} {item['metadata']['name']}"
        if of not in schemas.texts:
            mistakes.append(f"{name}: there is no {of}")
        else:
            mistakes.extend(schemas.check(of, item, name))
    print(looked_at)
    print("\n".join(mistakes))


main()
