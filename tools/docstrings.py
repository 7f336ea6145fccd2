"""What the site's API pages need from docstrings: a griffe extension, named in mkdocs.yml.

Docstrings are written for ``help()``: "Example:" and Sphinx roles (a ``:class:`` before a name in
backquotes) become what mkdocstrings understands. Roles lead to a heading where there is one.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr):`(~?)([\w.]+)`")


def _linked(owner: str, role: re.Match[str]) -> str:
    short, name = role.groups()
    shown = name.rsplit(".", 1)[-1] if short else name
    if not name.startswith("hyperopt_torch."):
        name = f"hyperopt_torch.{name if name[0].isupper() else f'{owner}.{name}'}"
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'


class ReadableDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        owner = obj.parent.name if obj.is_function and obj.parent else obj.name
        text = re.sub(r"^Example:", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r"^::\n", "", text, flags=re.MULTILINE)
        obj.docstring.value = _ROLE.sub(lambda role: _linked(owner, role), text)
