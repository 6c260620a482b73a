"""Holds our CRDs against those that Gateway API and Istio publish.

Usage: published_crds.py sum ZIP
       published_crds.py compare CRDS ZIP...
       published_crds.py experimental CRDS ZIP...
       published_crds.py objects CRDS FILES EACH SEED ZIP...

The ZIPs are Go modules. `sum` prints what go.sum has of one. `compare` prints each difference between the CRDs in directory CRDS and
the standard published ones on a line of its own, `experimental` each field that only the experimental ones have. `objects` makes EACH
objects of each kind, of those in the YAML files below FILES (a list joined by `:`) and of the schemas' limits, and prints each as JSON
with what is wrong with it by the published schema, CEL rules left out.
"""

import base64
import copy
import hashlib
import json
import pathlib
import random
import re
import sys
import zipfile

CHANNELS = {"standard": "config/crd/standard/", "experimental": "config/crd/experimental/"}
ISTIO = "kubernetes/customresourcedefinitions.gen.yaml"
# What others decide by. The rest of a published CRD's metadata is about charts.
ANNOTATIONS = ["api-approved.kubernetes.io", "gateway.networking.k8s.io/bundle-version", "gateway.networking.k8s.io/channel"]
# Schemas below these keys are by name; below those, single ones or lists.
NAMED, SINGLE = {"properties"}, {"items", "additionalProperties", "not", "oneOf", "anyOf", "allOf"}


def module_sum(path):
    with zipfile.ZipFile(path) as module:
        lines = [f"{hashlib.sha256(module.read(name)).hexdigest()}  {name}\n" for name in sorted(module.namelist())]
    return "h1:" + base64.b64encode(hashlib.sha256("".join(lines).encode()).digest()).decode()


def documents(text):
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, loader) if isinstance(document, dict)]


def by_name(objects):
    return {each["metadata"]["name"]: each for each in objects if each.get("kind") == "CustomResourceDefinition"}


def ours(directory):
    texts = [path.read_text() for path in sorted(pathlib.Path(directory).glob("*.yaml"))]
    return by_name(each for text in texts for each in documents(text))


def published(modules, channel):
    found = []
    for path in modules:
        with zipfile.ZipFile(path) as module:
            for name in module.namelist():
                _, _, inside = name.partition("@")
                inside = inside.partition("/")[2]
                if inside == ISTIO or inside.startswith(CHANNELS[channel]):
                    found.extend(documents(module.read(name).decode()))
    return by_name(found)


# What is to be equal.


def facts(schema):
    """A schema without the words that are for people, and with what has no order in one."""
    out = {}
    for key, value in schema.items():
        if key == "description":
            continue
        if key in NAMED:
            out[key] = {name: facts(each) for name, each in value.items()}
        elif key in SINGLE and isinstance(value, dict):
            out[key] = facts(value)
        elif key in SINGLE and isinstance(value, list):
            out[key] = [facts(each) for each in value]
        elif key == "x-kubernetes-validations":
            # Messages are for people, and blanks between words mean nothing.
            rules = [{k: v for k, v in rule.items() if not k.startswith("message")} for rule in value]
            out[key] = {" ".join(rule.pop("rule").split()): rule for rule in rules}
        elif key in ("required", "enum", "x-kubernetes-list-map-keys"):
            out[key] = sorted(value, key=json.dumps)
        else:
            out[key] = value
    return out


def version_facts(version):
    version = copy.deepcopy(version)
    schema = facts(version["schema"]["openAPIV3Schema"])
    # The API server adds these to a schema that lacks them.
    for name, of in (("apiVersion", "string"), ("kind", "string"), ("metadata", "object")):
        schema.setdefault("properties", {}).setdefault(name, {"type": of})
    columns = [{k: v for k, v in column.items() if k != "description"} for column in version["additionalPrinterColumns"]]
    return {**version, "schema": schema, "additionalPrinterColumns": columns}


def crd_facts(crd):
    spec = copy.deepcopy(crd["spec"])
    spec["versions"] = {version["name"]: version_facts(version) for version in spec["versions"]}
    annotations = crd["metadata"].get("annotations") or {}
    return {"annotations": {key: annotations.get(key) for key in ANNOTATIONS}, "spec": spec}


def differences(mine, theirs, path):
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            at = f"{path}.{key}"
            if key not in theirs:
                yield f"{at}: only ours has this: {json.dumps(mine[key])}"
            elif key not in mine:
                yield f"{at}: only the published one has this: {json.dumps(theirs[key])}"
            else:
                yield from differences(mine[key], theirs[key], at)
    elif mine != theirs:
        yield f"{path}: ours is {json.dumps(mine)}, the published one {json.dumps(theirs)}"


def compare(directory, modules):
    standard = published(modules, "standard")
    for name, crd in ours(directory).items():
        if name not in standard:
            yield f"{name}: is not published"
        else:
            yield from differences(crd_facts(crd), crd_facts(standard[name]), name)


# What only some clusters have.


def fields(schema, at=""):
    for name, each in schema.get("properties", {}).items():
        path = f"{at}.{name}".lstrip(".")
        yield path
        yield from fields(each, path)
    if isinstance(schema.get("items"), dict):
        yield from fields(schema["items"], at + "[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from fields(schema["additionalProperties"], at + ".{}")


def experimental(directory, modules):
    """The topmost fields of specs."""
    more = published(modules, "experimental")
    for name, crd in ours(directory).items():
        if name not in more:
            continue
        known = set(fields(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]))
        new = [path for path in fields(more[name]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]) if path not in known]
        for path in new:
            below = any(path.startswith((other + ".", other + "[")) for other in new)
            if path.startswith("spec.") and not below:
                yield f"{crd['spec']['names']['kind']} {path}"


# What a schema says of objects.


def json_schema(schema):
    """As JSON Schema has it: OpenAPI 3.0 writes some things in another way."""
    out = {}
    for key, value in schema.items():
        if key in NAMED:
            out[key] = {name: json_schema(each) for name, each in value.items()}
        elif key in SINGLE and isinstance(value, dict):
            out[key] = json_schema(value)
        elif key in SINGLE and isinstance(value, list):
            out[key] = [json_schema(each) for each in value]
        elif not key.startswith("x-kubernetes-") and key not in ("description", "default", "nullable"):
            out[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("format") in ("int32", "uint32", "int64"):
        low, high = {"int32": (-(2**31), 2**31 - 1), "uint32": (0, 2**32 - 1), "int64": (-(2**63), 2**63 - 1)}[schema["format"]]
        out["minimum"], out["maximum"] = max(low, schema.get("minimum", low)), min(high, schema.get("maximum", high))
    kind = schema.get("x-kubernetes-list-type")
    if kind == "set":
        out["uniqueItems"] = True
    return out


def filled_in(value, schema):
    """With the defaults of its schema and without nulls, as the API server has it before it looks."""
    if isinstance(value, dict):
        for name in [name for name in value if value[name] is None and child_of(schema)]:
            del value[name]
        for name, each in schema.get("properties", {}).items():
            if value.get(name) is None:
                value.pop(name, None)
                if "default" in each:
                    value[name] = copy.deepcopy(each["default"])
        for name in value:
            value[name] = filled_in(value[name], schema.get("properties", {}).get(name) or child_of(schema))
    elif isinstance(value, list):
        items = schema.get("items")
        value = [filled_in(each, items if isinstance(items, dict) else {}) for each in value]
    return value


def child_of(schema):
    more = schema.get("additionalProperties")
    return more if isinstance(more, dict) else {}


def doubles(value, schema, path="$"):
    """Lists with keys that are there twice: JSON Schema has no such thing."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from doubles(each, schema.get("properties", {}).get(name) or child_of(schema), f"{path}.{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        if schema.get("x-kubernetes-list-type") == "map":
            keys = schema["x-kubernetes-list-map-keys"]
            seen = [json.dumps([each.get(key) for key in keys]) for each in value if isinstance(each, dict)]
            if len(set(seen)) < len(seen):
                yield f"{path}: a key is there twice"
        for at, each in enumerate(value):
            yield from doubles(each, schema["items"], f"{path}[{at}]")


class Judge:
    def __init__(self, crd):
        import jsonschema

        self.schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        checker = jsonschema.FormatChecker(formats=())
        checker.checks("ipv4")(lambda value: not isinstance(value, str) or is_address(value, 4))
        checker.checks("ipv6")(lambda value: not isinstance(value, str) or is_address(value, 6))
        self.validator = jsonschema.Draft4Validator(json_schema(self.schema), format_checker=checker)

    def faults(self, item):
        item = filled_in(copy.deepcopy(item), self.schema)
        errors = [f"{error.json_path}: {error.message}"[:300] for error in self.validator.iter_errors(item)]
        return sorted(errors + list(doubles(item, self.schema)))


def is_address(text, version):
    import ipaddress

    try:
        return ipaddress.ip_address(text).version == version and "%" not in text
    except ValueError:
        return False


# Objects, in order and just out of it.


class Maker:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def text(self, schema):
        """Of a length at a limit, or in between."""
        low, high = schema.get("minLength", 0), schema.get("maxLength", 12)
        if self.random.random() < 0.85:
            fits = [text for text in TEXTS if low <= len(text) <= high and re.search(schema.get("pattern", ""), text)]
            if fits:
                return self.random.choice(fits)
        length = self.random.choice([low - 1, low, low + 1, high, high + 1, min(high, 8)])
        letters = self.random.choice(["a", "a1-", "aB.", "a/", "A_ ", "0", "a*", "ä"])
        return "".join(self.random.choice(letters) for _ in range(max(length, 0)))

    def number(self, schema):
        low, high = schema.get("minimum", 0), schema.get("maximum", 2**31 - 1)
        if self.random.random() < 0.8:
            return self.random.choice([low, low + 1, high, min(80, high)])
        return self.random.choice([low - 1, low, low + 1, high - 1, high, high + 1, 80])

    def some(self, schema, depth=0):
        """A value of a schema, mostly of its type."""
        if self.random.random() < 0.01:
            return self.random.choice([None, "text", 7, True, [], {}, [1], {"a": 1}])
        if "enum" in schema:
            return self.random.choice([*schema["enum"], "Other"] if self.random.random() < 0.1 else schema["enum"])
        of = schema.get("type")
        if of == "string":
            return self.random.choice(TEXTS) if self.random.random() < 0.05 else self.text(schema)
        if of == "integer" or schema.get("x-kubernetes-int-or-string"):
            return self.number(schema)
        if of == "boolean":
            return self.random.random() < 0.5
        if of == "array":
            low, high = schema.get("minItems", 0), schema.get("maxItems", 3)
            far = [high, high + 1] if high <= 64 and depth < 8 else []
            count = max(low, self.random.choice([low, 1, 2]))
            if self.random.random() < 0.1:
                count = max(0, self.random.choice([low - 1, *far]))
            return [self.some(schema.get("items", {}), depth + 1) for _ in range(count)]
        if isinstance(schema.get("additionalProperties"), dict):
            low, high = schema.get("minProperties", 0), schema.get("maxProperties", 3)
            count = max(low, self.random.choice([low, 1, 2]))
            if self.random.random() < 0.1:
                count = max(0, self.random.choice([low - 1, *([high, high + 1] if high <= 64 else [])]))
            return {f"{self.text({})}{at}": self.some(child_of(schema), depth + 1) for at in range(count)}
        required = schema.get("required", [])
        chance = 0.4 if depth < 6 else 0.15
        out = {}
        for name, each in schema.get("properties", {}).items():
            if self.random.random() < (0.99 if name in required else chance):
                out[name] = self.some(each, depth + 1)
        return out

    def change(self, value, schema):
        """Changes one place of a value, chosen at random."""
        places = []
        self.places(value, schema, places)
        holder, key, of = self.random.choice(places)
        action = self.random.random()
        if action < 0.25 and isinstance(holder, dict):
            del holder[key]
        elif action < 0.4 and isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[key])] * self.random.choice([1, 1, 1, 16, 64]))
        elif action < 0.5 and isinstance(holder[key], dict):
            names = list(of.get("properties", {"other": {}}))
            name = self.random.choice(names)
            holder[key][name] = self.some(of.get("properties", {}).get(name, {}))
        else:
            holder[key] = self.some(of)

    def places(self, value, schema, out):
        if isinstance(value, dict):
            for name in value:
                of = schema.get("properties", {}).get(name) or child_of(schema)
                out.append((value, name, of))
                self.places(value[name], of, out)
        elif isinstance(value, list):
            of = schema.get("items") or {}
            for at, each in enumerate(value):
                out.append((value, at, of))
                self.places(each, of, out)


# What patterns ask for, and what they do not.
TEXTS = """a example.org *.example.org a.b-c Service gateway.networking.k8s.io istio.io/controller a/b /path /%zz 10s 1h30m 10 x-a
    10.0.0.1 fd00::1 10.0.0.0/8 NamedAddress IPAddress Hostname https://example.org https://*.example.org * GET Accepted -a a- A B.C
    2026-11-27T00:00:00Z unix:///x True a_b 1""".split()


def samples(directories, kind):
    found = []
    for directory in directories.split(":"):
        for path in sorted(pathlib.Path(directory).rglob("*.yaml")):
            for each in documents(path.read_text()):
                if each.get("kind") == kind and isinstance(each.get("spec"), dict):
                    found.append(each["spec"])
    return found


def objects(directory, files, each, seed, modules):
    standard = published(modules, "standard")
    for name, crd in ours(directory).items():
        spec = crd["spec"]
        theirs, mine = Judge(standard[name]), Judge(crd)
        schema = theirs.schema["properties"]["spec"]
        known = samples(files, spec["names"]["kind"])
        maker = Maker(f"{seed} {name}")
        for at in range(each):
            if at < len(known):
                made = copy.deepcopy(known[at])
            elif at % 3 == 0 or not known:
                made = maker.some(schema)
            else:
                made = copy.deepcopy(maker.random.choice(known))
                for _ in range(maker.random.choice([1, 1, 2, 4])):
                    holder = {"spec": made}
                    maker.change(holder, {"properties": {"spec": schema}})
                    made = holder.get("spec", {})
                    if not isinstance(made, dict):
                        break
            item = {
                "apiVersion": f"{spec['group']}/{spec['versions'][0]['name']}",
                "kind": spec["names"]["kind"],
                "metadata": {"name": f"made-{at}"},
                "spec": made,
            }
            faults = theirs.faults(item)
            if faults != mine.faults(item):
                sys.exit(f"{json.dumps(item)}: {faults} by the published schema, {mine.faults(item)} by ours")
            yield json.dumps({"plural": spec["names"]["plural"], "object": item, "faults": faults})


def main():
    command, *rest = sys.argv[1:]
    if command == "sum":
        lines = [module_sum(rest[0])]
    elif command == "compare":
        lines = compare(rest[0], rest[1:])
    elif command == "experimental":
        lines = experimental(rest[0], rest[1:])
    else:
        lines = objects(rest[0], rest[1], int(rest[2]), rest[3], rest[4:])
    for line in lines:
        print(line)


main()
