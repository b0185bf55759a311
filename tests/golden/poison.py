"""Texts that try to become code, and how they get into every text of the explorer's documents."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

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


_OURS = (
    "question",
    "port",
    "kind",
    "name",
    "values",
    "verdict",
    "stored",
    "ports",
    "vectors",
    "columns",
    "windows",
    "counts",
)
"""Fields of the documents whose texts are words of this package, names of documents, or numbers."""


@dataclass
class Poison:
    """Puts a poison behind every text of documents that may come from a checkpoint, a run or a user.

    Attributes:
        texts: the poisons, without end.
        intact: texts that stay, such as the labels of parts, so that pages which need them show the rest.
        known: of every text what it became; one text has one poison, so that what names the same goes on to.
    """

    texts: Iterator[str]
    intact: Collection[str] = ()
    known: dict[str, str] = field(default_factory=dict)

    def into(self, data: Any) -> Any:
        if isinstance(data, str) and data not in self.intact and not data.isdigit():
            if data not in self.known:
                self.known[data] = data + next(self.texts)
            return self.known[data]
        if isinstance(data, list):
            return [self.into(item) for item in data]
        if isinstance(data, dict):
            return {k: v if _ours(k, v) else self.into(v) for k, v in data.items()}
        return data


def _ours(name: str, value: Any) -> bool:
    return name in _OURS and (isinstance(value, str) or name in ("stored", "ports", "vectors") or "score" in value)
