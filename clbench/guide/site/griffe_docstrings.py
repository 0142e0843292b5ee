"""For mkdocstrings: docstrings in this house's form (indented equations, lists of `name   what it is`) as Markdown."""

from __future__ import annotations

import importlib
import re
from typing import Any

from clbench.guide.site import prose

griffe: Any = importlib.import_module("griffe")


class Docstrings(griffe.Extension):
    """An extension of griffe, which reads the source text."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one docstring, unless it has parts that mkdocstrings knows; griffe calls it for each object that it loads."""
        if obj.docstring is not None and not re.search(r"^(Args|Raises):$", obj.docstring.value, re.M):
            obj.docstring.value = prose.docstring(obj.docstring.value)
