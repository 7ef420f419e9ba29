"""Where code may break: in tables at dots and underscores, for narrow screens; inside `--options` nowhere."""

import re
from typing import Any

_CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>[^<]*</code>")


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs for each page's HTML."""
    content = _CELL.sub(lambda cell: _CODE.sub(_in_table, cell[0]), content)
    return _CODE.sub(_whole_options, content)


def _in_table(code: re.Match[str]) -> str:
    return re.sub(r"(?<=[A-Za-z])([._=])(?=[A-Za-z])", r"\1<wbr>", code[0])


def _whole_options(code: re.Match[str]) -> str:
    return re.sub(r"(?<![\w-])--[\w-]+", r'<span class="option">\g<0></span>', code[0])
