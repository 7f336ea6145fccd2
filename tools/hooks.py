"""What mkdocs does to every page: a way to the glossary at its end."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Adds the link, relative to where the page is."""
    if page.file.src_uri == "glossary.md":
        return markdown
    up = "../" * page.file.src_uri.count("/")
    return f"{markdown}\n\n---\n\nA word that is not explained here: [glossary]({up}glossary.md).\n"
