"""ES modules -> classic scripts, for pages that are opened as files.

In: the modules of a page, by name. Out: one script that does the same. Knows of JavaScript only what such modules use:
imports of names or of a whole module, exports before a declaration or in braces.

A browser loads no module for a page that was opened from a disk, since such a page has no origin; a classic script it
does run. So each module becomes a function that returns what it exports, the imported ones first.
"""

from __future__ import annotations

import re
from collections.abc import Callable

FROM = r"from\s*[\"']\./(?P<file>[\w./-]+)[\"'];?[ \t]*$"
IMPORT_NAMES = re.compile(rf"^import\s*\{{(?P<names>[^}}]*)\}}\s*{FROM}", re.MULTILINE)
IMPORT_ALL = re.compile(rf"^import\s*\*\s*as\s+(?P<name>[\w$]+)\s+{FROM}", re.MULTILINE)
EXPORT = re.compile(r"^export\s+(?=(?:async\s+)?(?:function\*?|class|const)\s+(?P<name>[\w$]+))", re.MULTILINE)
EXPORT_NAMES = re.compile(r"^export\s*\{(?P<names>[^}]*)\};?[ \t]*$", re.MULTILINE)
LEFT = re.compile(r"^(?:import|export)\b.*|.*\bimport\s*(?:\(|\.).*", re.MULTILINE)
RENAMED = re.compile(r"\s+as\s+")


def bundle(first: str, read: Callable[[str], str]) -> str:
    """The module called `first`, and all that it imports -> one classic script. read: name -> source.

    Raises ValueError for what is not understood, a circle of imports among it.
    """
    done: dict[str, str] = {}
    parts: list[str] = []

    def add(name: str, above: tuple[str, ...]) -> str:
        if name in above:
            raise ValueError(f"{name} imports itself by way of {', '.join(above)}")
        if name not in done:
            source, exports = translate(name, read(name), lambda other: add(other, (*above, name)))
            done[name] = f"$module{len(done)}"
            parts.append(
                f"// {name}\nconst {done[name]} = await (async () => {{\n{source}\nreturn {exports};\n}})();\n"
            )
        return done[name]

    add(first, ())
    return '"use strict";\n(async () => {\n' + "\n".join(parts) + "})();\n"


def translate(name: str, source: str, module: Callable[[str], str]) -> tuple[str, str]:
    """A module's source -> that of a function's body, and what it is to return. module: the variable of another."""

    def import_names(match: re.Match[str]) -> str:
        pairs = (RENAMED.split(part.strip()) for part in match["names"].split(",") if part.strip())
        return f"const {{{', '.join(': '.join(pair) for pair in pairs)}}} = {module(match['file'])};"

    exported: list[str] = []

    def export_names(match: re.Match[str]) -> str:
        exported.extend(properties(match["names"]))
        return ""

    source = IMPORT_NAMES.sub(import_names, source)
    source = IMPORT_ALL.sub(lambda match: f"const {match['name']} = {module(match['file'])};", source)
    exported += [match["name"] for match in EXPORT.finditer(source)]
    source = EXPORT_NAMES.sub(export_names, EXPORT.sub("", source))
    if left := LEFT.search(source):
        raise ValueError(f"{name}: {left[0].strip()[:80]!r} is not understood")
    return source, f"{{{', '.join(exported)}}}"


def properties(names: str) -> list[str]:
    """The names of an export in braces -> properties of an object: "a as b, c" -> "b: a", "c"."""
    pairs = [RENAMED.split(part.strip()) for part in names.split(",") if part.strip()]
    return [": ".join(reversed(pair)) for pair in pairs]


def as_value(library: str) -> str:
    """A library in one module that ends with its exports, and imports nothing -> an expression of what it exports.

    Where it lies it is not told. Raises ValueError if it has another form.
    """
    body, found, names = library.rpartition("export{")
    inside, end, _ = names.partition("}")
    if not (found and end):
        raise ValueError("the library does not end with its exports")
    body = body.replace("import.meta.url", '""')
    if "import.meta" in body:
        raise ValueError("the library asks for more than where it lies")
    return f"(() => {{\n{body}\nreturn {{{', '.join(properties(inside))}}};\n}})()"
