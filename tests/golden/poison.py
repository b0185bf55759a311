"""A report of a model whose labels, tokens and names try to become code, opened in Chromium.

``python tests/golden/poison.py`` writes the report, opens it in a headless Chromium, and prints how many poisons there
are and which of them ran or asked for something. The suite does the same. The content security policy is taken out, so
that the escaping stands alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny

_CODE = "document.documentElement.setAttribute('data-ran',{n});new Image().src='{url}{n}'"
POISONS = (
    "<script>{code}</script>",
    "</script><script>{code}</script>",
    "</SCRIPT ><script>{code}//",
    "<!--<script>{code}</script>-->",
    "<!-- <script> --></script><script>{code}</script>",
    "]]><script>{code}</script>",
    '"><script>{code}</script>',
    "'><script>{code}</script>",
    "<img src=x onerror={code}>",
    '<img src="{url}{n}">',
    '"><img src=x onerror="{code}">',
    "<svg onload={code}>",
    "<svg><script>{code}</script></svg>",
    "<svg><animate onbegin={code} attributeName=x dur=1s>",
    "<svg><foreignObject><iframe src={url}{n}></iframe></foreignObject></svg>",
    "<body onload={code}>",
    "<iframe src=javascript:{code}>",
    "<iframe srcdoc='<script>parent.{code}</script>'>",
    "<object data={url}{n}>",
    "<embed src={url}{n}>",
    "<link rel=stylesheet href={url}{n}>",
    "<style>@import '{url}{n}';</style>",
    "<style>*{{background:url({url}{n})}}</style>",
    "</style><script>{code}</script>",
    "</title><script>{code}</script>",
    "</noscript><script>{code}</script>",
    "<math><mi xlink:href=javascript:{code}>x</mi></math>",
    "<a href=javascript:{code} autofocus onfocus={code}>x</a>",
    "<input autofocus onfocus={code}>",
    "<details open ontoggle={code}>",
    "<video><source onerror={code}></video>",
    "<audio src=x onerror={code}>",
    "<marquee onstart={code}>",
    "<meta http-equiv=refresh content='0;url={url}{n}'>",
    "<base href={url}{n}/>",
    "<form action={url}{n}><button autofocus>x",
    "javascript:{code}",
    "data:text/html,<script>{code}</script>",
    "\u2028{code}//",
    "\u2029{code}//",
    '";{code};//',
    "\\';{code};//",
    "`${{{code}}}`",
    "${{{code}}}",
    "{{{{{code}}}}}",
    "{{{{constructor.constructor('{code}')()}}}}",
    "<%={code}%>",
    "&lt;script&gt;{code}&lt;/script&gt;",
    "&#60;script&#62;{code}&#60;/script&#62;",
    "\\u003cscript\\u003e{code}\\u003c/script\\u003e",
    "\x00<script>{code}</script>",
    "\ufeff<script>{code}</script>",
    "\u202e<script>{code}</script>",
    "\ud800<script>{code}</script>",
    "%3Cscript%3E{code}%3C/script%3E",
    "__proto__",
    "constructor",
    "<template><script>{code}</script></template>",
)
"""What a label, a token or a name may hold."""


def poisoned(url: str) -> list[str]:
    """Every poison, with a number of its own in what it would do."""
    return [text.format(code=_CODE.format(n=n, url=url), n=n, url=url) for n, text in enumerate(POISONS)]


_OURS = ("question", "port", "kind", "name", "values", "verdict", "stored", "ports", "columns", "windows")
"""Fields of the documents whose texts are words of this package, names of documents, or numbers."""


def poison(data: Any, texts: Iterator[str], known: dict[str, str] | None = None) -> Any:
    """The page's data with a poison behind every text that may come from a checkpoint, a run or a user."""
    known = {} if known is None else known
    if isinstance(data, str):
        return known.setdefault(data, data + next(texts))  # one text, one poison: what names the same goes on to
    if isinstance(data, list):
        return [poison(item, texts, known) for item in data]
    if isinstance(data, dict):
        return {k: v if _ours(k, v) else poison(v, texts, known) for k, v in data.items()}
    return data


def _ours(name: str, value: Any) -> bool:
    return name in _OURS and (isinstance(value, str) or name in ("stored", "ports") or "score" in value)


def write_poisoned(path: Path, url: str) -> None:
    """The report of a map with a run of a tiny model, every text of it poisoned."""
    import virtual_weights as vw
    from virtual_weights.report.documents import documents
    from virtual_weights.report.page import page
    from virtual_weights.survey import manifest_of

    stream = vw.open(tiny("llama-grouped-untied"))
    survey = vw.Survey(stream, run=vw.Run.on_repeats(stream, 64, 16))
    parts = tuple(vw.Part(name) for name in ("composition", "bandwidth", "memory", "statements"))
    data = documents(vw.Plan(parts, edges=1).records(survey), manifest_of(stream, "tiny"))
    text = page(poison(data, cycle(poisoned(url))))
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), encoding="utf-8")


_PROBE = """<script>
setTimeout(() => {
  const root = document.documentElement.dataset;
  const count = (what) => document.querySelectorAll(what).length;
  const foreign = "img,iframe,object,embed,base,form:not([role=search]),video,audio,marquee,math,template," +
    "[onerror],[onload],[onfocus]";
  let [sections, elements] = [0, 0];
  const use = () => {
    for (const each of document.querySelectorAll("main button, details")) each.click();
    for (const each of document.querySelectorAll("svg *, td, canvas"))
      for (const event of ["pointerenter", "pointermove", "focus"]) each.dispatchEvent(new PointerEvent(event));
  };
  const pages = [...document.querySelectorAll("nav a")].map((link) => link.hash);
  const step = () => {
    use();
    setTimeout(() => {
      sections += count("main");
      elements += count(foreign);
      const next = pages.shift();
      if (next === undefined) new Image().src = `{url}done?${sections}&${elements}&${root.ran ?? ""}`;
      else { location.hash = next; setTimeout(step, 150); }
    }, 150);
  };
  step();
}, 500);
</script>"""
"""What runs last in the page, uses all of it, and reports: sections, foreign elements, and the number of what ran."""


class _Listener(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.log.append(self.path)  # type: ignore[attr-defined]
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def hits(chromium: str, scratch: Path, write: Callable[[Path, str], None] = write_poisoned) -> dict[str, Any]:
    """How many poisons there are, which of them asked a server for something, and whether any ran.

    Args:
        chromium: the program.
        scratch: an empty folder.
        write: writes the page, given where and the server's address.
    """
    with HTTPServer(("127.0.0.1", 0), _Listener) as server:
        server.log = log = list[str]()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, path = f"http://127.0.0.1:{server.server_port}/", scratch / "report.html"
        write(path, url)
        page = path.read_text(encoding="utf-8")
        path.write_text(page.replace("</body>", _PROBE.replace("{url}", url) + "</body>"), encoding="utf-8")
        # no sandbox: tests may run as root; it opens a file of ours
        flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=6000".split()
        command = [chromium, *flags, f"--user-data-dir={scratch}/profile", f"--screenshot={scratch}/page.png"]
        subprocess.run([*command, path.as_uri()], check=True, capture_output=True, timeout=120)
        server.shutdown()
    done = next((request for request in log if request.startswith("/done?")), "/done?0&0&")
    sections, foreign, ran = done.partition("?")[2].split("&")
    requests = [request for request in log if request != done]
    return {
        "poisons": len(POISONS),
        "sections": int(sections),
        "elements": int(foreign),
        "ran": ran,
        "requests": requests,
    }


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium here")
    with tempfile.TemporaryDirectory() as scratch:
        result = hits(chromium, Path(scratch))
    sys.stdout.write(f"{result}\n")
    sys.exit(bool(result["requests"] or result["ran"] or result["elements"] or not result["sections"]))


if __name__ == "__main__":
    main()
