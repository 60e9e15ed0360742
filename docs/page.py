"""The pictures of the page in the README, taken anew: a search, and why a photograph matches.

    python docs/page.py [OUT]        (search.webp and why.webp, beside this file if not said otherwise)

Indexes the photographs that `clipmatch demo` searches, scikit-image's, and opens `clipmatch serve` in a headless
Chromium, found on the path or named by CLIPMATCH_CHROMIUM. Needs the extras `demo`, `serve` and `dev`.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from clipmatch.demo import sample_photographs

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOW = {"width": 1000, "height": 560}
QUALITY = 80


def main(out):
    """Serve an index of the photographs and take its pictures."""
    path = os.environ.get("CLIPMATCH_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("There is no Chromium here; install one, or name it in CLIPMATCH_CHROMIUM.")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder, index = Path(scratch) / "Pictures", Path(scratch) / "photos.sqlite"
        folder.mkdir()
        for photograph in sample_photographs():
            shutil.copy(photograph, folder)
        clipmatch = [sys.executable, "-m", "clipmatch.cli"]
        subprocess.run([*clipmatch, "index", folder, "--index", index], check=True)
        with subprocess.Popen(
            [*clipmatch, "serve", "--index", index, "--port", "0"], stdout=subprocess.PIPE, text=True
        ) as server:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            try:
                address = server.stdout.readline().split()[-1]
                page = browser.new_page(viewport=WINDOW, color_scheme="light", locale="en-GB")
                take(page, address, out)
            finally:
                browser.close()
                server.terminate()


def take(page, address, out):
    """Both pictures of the page at an address -> files in a folder."""
    page.goto(f"{address}#q=a+cat+that+looks+at+you")
    expect(page.locator("#photos .tile").first).to_have_attribute("aria-label", re.compile("chelsea"))
    save(page, out / "search.webp")
    page.locator("#photos .tile").first.click()
    page.keyboard.press("e")
    expect(page.locator("#viewer .heat")).to_be_visible()
    save(page, out / "why.webp")


def save(page, file):
    """What the window shows now."""
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)  # for what moves to come to rest
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(file, quality=QUALITY, method=6)
    print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
