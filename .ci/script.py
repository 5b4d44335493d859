"""Write the script blocks of an HTML file to one JavaScript file: same line numbers, so that tsc points into the HTML.

Usage: script.py IN.html OUT.js
"""

import re
import sys
from pathlib import Path


def script(html: str) -> str:
    """The source of all inline scripts, with everything between them replaced by its line breaks."""
    out, position = "", 0
    for block in re.finditer(r"<script\b(?![^>]*\bsrc=)[^>]*>(.*?)</script>", html, re.DOTALL):
        out += re.sub(r"[^\n]", "", html[position : block.start(1)]) + block[1]
        position = block.end(1)
    return out + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(exist_ok=True)
    target.write_text(script(source.read_text(encoding="utf-8")), encoding="utf-8")
