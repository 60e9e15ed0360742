"""The server, asked all that its own description allows, and much that it does not.

    python benchmarks/api_fuzz.py [--examples 300] [--json FILE] [--server URL]

Schemathesis makes requests of /openapi.json, right and wrong ones, and holds the answers against it: no server error,
no status, media type or form that is not described, nothing wrong that is taken for right. By default a server is
started over the sample photographs of scikit-image; --server asks another one, whose index may be changed.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis
import schemathesis
from common import CLIPMATCH, machine, machine_line, table, write_json
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from clipmatch.demo import sample_photographs

# Not among them: that all is answered which the description allows. An empty query has the right form.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
KNOWN = 12  # numbers of photographs that are asked for: a few more than there are
PACE = 100  # requests a second, below what the server takes of one client


@contextlib.contextmanager
def own_server():
    """A server over the sample photographs -> its address."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, index = Path(scratch) / "Pictures", Path(scratch) / "photos.sqlite"
        folder.mkdir()
        for path in sample_photographs():
            shutil.copy(path, folder)
        subprocess.run([CLIPMATCH, "index", folder, "--index", index], check=True, stdout=sys.stderr)
        command = [CLIPMATCH, "serve", "--index", index, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process.stdout.readline().split()[-1]
            finally:
                process.terminate()


def ask(operation, examples):
    """Ask one endpoint -> how often it gave which status, and what was wrong, if anything was."""
    codes, began = Counter(), time.monotonic()

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=schemathesis_cases(operation))
    def run(case):
        number = case.path_parameters.get("number")
        if isinstance(number, int) and number >= 0:
            case.path_parameters["number"] = number % KNOWN
        time.sleep(max(0.0, began + sum(codes.values()) / PACE - time.monotonic()))
        response = case.call(headers={"X-Clipmatch": "1"})
        codes[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    try:
        run()
    except Exception as error:  # of whatever kind: the run goes on with the next
        return codes, f"{type(error).__name__}: {error}"
    return codes, None


def schemathesis_cases(operation):
    """Right requests and wrong ones."""
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    return right | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="for each endpoint")
    parser.add_argument("--server", metavar="URL", help="a server that runs already")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found, wrong = {}, {}
    with contextlib.nullcontext(options.server) if options.server else own_server() as address:
        schema = schemathesis.openapi.from_url(f"{address.rstrip('/')}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()
            codes, problem = ask(operation, options.examples)
            found[operation.label] = {str(code): count for code, count in sorted(codes.items())}
            if problem:
                wrong[operation.label] = problem
            print(f"  {operation.label}: {sum(codes.values())} requests", file=sys.stderr)
    total = Counter()
    for codes in found.values():
        total.update(codes)
    values = {"machine": machine("fastapi", "uvicorn", "schemathesis"), "examples": options.examples}
    values |= {"requests": sum(total.values()), "statuses": dict(sorted(total.items())), "endpoints": found}
    print(machine_line(values["machine"]))
    codes = sorted(total)
    rows = [[label, *(seen.get(code, "") for code in codes)] for label, seen in found.items()]
    print(table(["endpoint", *codes], [*rows, ["all", *(total[code] for code in codes)]]))
    write_json(options.json, values | {"wrong": wrong})
    for label, problem in wrong.items():
        print(f"\n{label}\n{problem}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
