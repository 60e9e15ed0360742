"""`clipmatch serve` at ten times a family's use: answers, errors, memory.

    python benchmarks/server_load.py [--minutes 10] [--times 10] [--photographs 200] [--json FILE]

A family is five people who look through their photographs at the same time; what each of them does in a minute is in
`MINUTE`. Requests come at random moments (a Poisson process) whether or not earlier ones are answered, each person's
over at most six connections, as browsers do. Times run from the moment at which a request was due. Photographs are
the samples of scikit-image, each in several cuts of four megapixels. Memory is that of the server and of its decoders.
The page's own pictures are kept by the server once made, so the first minute has the most to do; it is counted too.
"""

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
from common import CLIPMATCH, machine, machine_line, table, write_json
from PIL import Image

from clipmatch.demo import sample_photographs

try:
    import httpx2 as httpx
except ModuleNotFoundError:  # Python 3.10
    import httpx

FAMILY = 5  # people
MINUTE = {  # what one of them asks for in a minute
    "thumb": 60,  # small pictures that scroll into view and are not yet in the browser's cache
    "full": 4,  # photographs opened
    "search": 3,  # sentences
    "browse": 1,  # all photographs, a page of 60
    "similar": 0.5,  # more like this
    "status": 0.5,  # the page opened
    "explain": 0.2,  # why it matches
    "search-image": 0.2,  # by a picture of their own
}
SENTENCES = ("a cat", "a cup of coffee", "people on a beach", "a rocket", "old coins", "something red", "a brick wall")
SIDE = (2400, 1700)  # pixels
LATE = 30.0  # seconds after which a request counts as failed
EVERY = 5.0  # seconds between two looks at the memory


def photograph(folder, count):
    """Write this many different JPEG files of four megapixels."""
    samples = sample_photographs()
    draw = random.Random(0)
    for number in range(count):
        with Image.open(samples[number % len(samples)]) as image:
            picture = image.convert("RGB")
        width, height = (max(8, round(side * draw.uniform(0.6, 1))) for side in picture.size)
        left, top = draw.randrange(picture.width - width + 1), draw.randrange(picture.height - height + 1)
        cut = picture.crop((left, top, left + width, top + height)).resize(SIDE)
        cut.save(folder / f"IMG_{number:04d}.jpg", quality=88)


class Load:
    """All people, and how long they waited."""

    def __init__(self, address, count, picture):
        self.address, self.count, self.picture = address, count, picture
        self.seconds, self.errors = defaultdict(list), []
        self.draw = random.Random(1)

    async def ask(self, client, kind, due):
        """One request; due: by the clock, when it was to be asked."""
        number = self.draw.randint(1, self.count)
        sentence = self.draw.choice(SENTENCES)
        headers = {"X-Clipmatch": "1"}
        try:
            match kind:
                case "thumb" | "full":
                    answer = await client.get(f"api/photos/{number}/{kind}")
                case "similar":
                    answer = await client.get(f"api/photos/{number}/similar")
                case "status":
                    answer = await client.get("api/status")
                case "search":
                    answer = await client.post("api/search", json={"query": sentence, "size": 60})
                case "browse":
                    answer = await client.post("api/browse", json={"page": self.draw.randint(1, 3)})
                case "explain":
                    answer = await client.post("api/explain", json={"id": number, "query": sentence})
                case "search-image":
                    form = {"files": {"image": ("x.jpg", self.picture)}, "data": {"question": "{}"}}
                    answer = await client.post("api/search-image", headers=headers, **form)
            if answer.status_code != 200 or not answer.content:
                self.errors.append(f"{kind}: {answer.status_code} {answer.text[:100]}")
        except httpx.HTTPError as error:
            self.errors.append(f"{kind}: {type(error).__name__} {error}")
        self.seconds[kind].append(time.monotonic() - due)

    async def person(self, stack, until):
        """Ask at random moments until it is over."""
        limits = httpx.Limits(max_connections=6, max_keepalive_connections=6)
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=self.address, limits=limits, timeout=httpx.Timeout(LATE, pool=LATE))
        )
        kinds, weights = list(MINUTE), list(MINUTE.values())
        due, begun = time.monotonic(), set()
        while (due := due + self.draw.expovariate(sum(weights) / 60)) < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.ask(client, self.draw.choices(kinds, weights)[0], due))
            begun.add(task)
            task.add_done_callback(begun.discard)
        await asyncio.gather(*begun)


async def load(people, seconds, address, count, picture, process):
    """So many people for so long -> their waits, and (seconds since the start, megabytes) of memory."""
    found, memory, start = Load(address, count, picture), [], time.monotonic()
    async with AsyncExitStack() as stack:
        asked = asyncio.gather(*(found.person(stack, start + seconds) for _ in range(people)))
        while not asked.done():
            memory.append((time.monotonic() - start, memory_of(process.pid)))
            await asyncio.wait([asked], timeout=EVERY)
        await asked
    return found, memory


def memory_of(pid):
    """Resident megabytes of a process and of those that it started; None where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return None
    return pages * 4096 / 1e6 + sum(memory_of(int(child)) or 0 for child in children)


def serve(scratch, count):
    """A server over that many photographs -> its process and address."""
    folder, index = scratch / "Pictures", scratch / "photos.sqlite"
    folder.mkdir()
    photograph(folder, count)
    subprocess.run([CLIPMATCH, "index", folder, "--index", index], check=True, stdout=sys.stderr)
    process = subprocess.Popen(
        [CLIPMATCH, "serve", "--index", index, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, re.search(r"http://\S+", process.stdout.readline())[0]


def figures(found, memory, seconds):
    """What is told of a run; times in milliseconds."""
    waits = {kind: np.array(found.seconds[kind]) * 1000 for kind in MINUTE if found.seconds[kind]}
    waits["all"] = np.concatenate(list(waits.values()))
    told = {
        kind: {
            "requests": len(row),
            "p50_ms": float(np.quantile(row, 0.5)),
            "p99_ms": float(np.quantile(row, 0.99)),
            "most_ms": float(row.max()),
        }
        for kind, row in waits.items()
    }
    after = [megabytes for moment, megabytes in memory if moment >= seconds / 10 and megabytes is not None]
    return {
        "requests_per_second": len(waits["all"]) / seconds,
        "waits": told,
        "errors": found.errors,
        "memory_mb": {"after_a_tenth": after[0], "end": after[-1], "most": max(after)} if after else None,
        "memory_mb_by_minute": [megabytes for _, megabytes in memory[:: round(60 / EVERY)]],
    }


def show(result):
    print(machine_line(result["machine"]))
    print(f"{result['people']} people, {result['minutes']:g} minutes, {result['photographs']} photographs")
    rows = [
        [kind, row["requests"], f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", f"{row['most_ms']:.0f}"]
        for kind, row in result["waits"].items()
    ]
    print(table(["request", "asked", "p50 ms", "p99 ms", "most ms"], rows))
    print(f"{len(result['errors'])} errors; {result['requests_per_second']:.1f} requests a second")
    if memory := result["memory_mb"]:
        print(f"memory: {memory['after_a_tenth']:.0f} MB after a tenth, {memory['end']:.0f} MB at the end")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--times", type=float, default=10, help="a family's use")
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    people = max(1, round(options.times * FAMILY))
    with tempfile.TemporaryDirectory() as scratch:
        process, address = serve(Path(scratch), options.photographs)
        try:
            picture = (Path(scratch) / "Pictures" / "IMG_0000.jpg").read_bytes()
            seconds = options.minutes * 60
            run = load(people, seconds, address, options.photographs, picture, process)
            found, memory = asyncio.run(run)
        finally:
            process.terminate()
            said = process.communicate(timeout=30)[1]
    result = {"machine": machine("fastapi", "uvicorn", "onnxruntime"), "people": people, "minutes": options.minutes}
    result |= {"photographs": options.photographs, "said": said, **figures(found, memory, seconds)}
    show(result)
    write_json(options.json, result)
    for error in result["errors"][:10] + said.splitlines()[-10:]:
        print(error, file=sys.stderr)
    sys.exit(1 if result["errors"] or said else 0)


if __name__ == "__main__":
    main()
