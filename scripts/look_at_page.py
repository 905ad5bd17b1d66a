"""Pictures of a page that ``ptq compare --html`` wrote, as headless Chromium shows it: narrow and wide, light and dark, details open.

    python scripts/look_at_page.py comparison.html pictures

Prints what the console said and whether the page scrolls sideways. Chromium comes as a package of most systems (apt install chromium).
"""

from __future__ import annotations

import sys
from pathlib import Path

from chromium import Chromium, find_chromium

WIDTHS = (400, 1400)


def main(page: Path, folder: Path) -> int:
    program = find_chromium()
    if program is None:
        print("no Chromium is on the PATH; install one, or name it in PTQ_CHROMIUM")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    browser = Chromium(program)
    try:
        for width in WIDTHS:
            for dark in (False, True):
                browser.open(page, width, dark)
                browser.value("document.querySelectorAll('details').forEach(each => each.open = true)")
                file = folder / f"{page.stem}-{width}-{'dark' if dark else 'light'}.png"
                file.write_bytes(browser.picture())
                print(f"{file}: the page is {browser.value('document.documentElement.scrollWidth')} pixels wide")
    finally:
        browser.close()
    print("\n".join(browser.problems) or "nothing in the console")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
