"""All pages into a folder, and HTML made of them by mkdocs (`pip install 'clbench[docs]'`), where a warning is an error."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import clbench
from clbench.guide import topics
from clbench.guide.site import choices, learners, prose, public
from clbench.interfaces import UserError
from clbench.records.record import write_text

NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python")
STYLE = """\
.md-typeset pre > code { white-space: pre-wrap; overflow-wrap: anywhere; }
.md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset table:not([class]) td, .md-typeset table:not([class]) th { min-width: 0; padding: .5em .8em; }
.md-typeset table:not([class]) code { word-break: normal; }
"""


def pages(cards: str = "", commands: Mapping[str, str] | None = None) -> dict[str, str]:
    """File -> Markdown. `cards`: the text of CARDS.md; `commands`: command -> its help."""
    made = guide_pages()
    made |= learners.pages(cards) | choices.pages() | public.pages()
    if commands:
        shown = [part for name, words in commands.items() for part in (f"## {name}", prose.block(words))]
        made["commands.md"] = "\n\n".join(["# Commands", "What `clbench COMMAND --help` says.", *shown]) + "\n"
    return {"index.md": home_page(bool(commands)), **made}


def guide_pages() -> dict[str, str]:
    """The guide's pages; where one says `clbench help TOPIC`, it links to that page."""
    known = topics.topics()
    made = {}
    for topic, path in known.items():
        said = path.read_text(encoding="utf-8")
        linked = re.sub(r"`clbench help ([a-z_]+)`", lambda m: f"[{m[0]}]({m[1]}.md)" if m[1] in known else m[0], said)
        made[f"guide/{topic}.md"] = linked
    return made


def home_page(with_commands: bool) -> str:
    """Where everything is."""
    listed = [f"- [{prose.text(topics.title(path))}](guide/{topic}.md)" for topic, path in topics.topics().items()]
    counts = {group: len(names) for group, names in choices.names().items()}
    rows = [
        ("[learners](learners/index.md)", f"{len(learners.named())} methods: paper, equations, options, card, command"),
        ("[scenarios](scenarios/index.md)", f"{counts['scenario']} streams by family"),
        ("[operators](choices/operators.md)", f"{counts['operator']} functions that make other streams of them"),
        ("[models](choices/models.md)", f"{counts['model']} networks"),
        ("[schedules](choices/schedules.md)", f"{counts['schedule']} learning-rate schedules"),
        ("[parameter-efficient modules](choices/pets.md)", f"{counts['pet']} of them"),
        ("[evaluators and numbers](choices/evaluators.md)", "what is summed, and every formula on one worked example"),
        ("[published tables](choices/sweeps.md)", f"{counts['sweep']} sweeps with the numbers that were published"),
        ("[effects](choices/effects.md)", f"{counts['effect']} claims of the literature, shown on small streams"),
        ("[search spaces](choices/tunes.md), [machines](choices/machines.md)", "for tuning; for sweeps"),
        ("[options of every run](choices/options.md)", "with their defaults"),
        ("[Python names](api/index.md)", f"{len(clbench.__all__)} names that plug-ins import"),
    ]
    rows += [("[commands](commands.md)", "what each takes")] if with_commands else []
    parts = [
        "# clbench",
        "Continual learning measured so that it can be trusted: a scenario x a learner x a model x a seed gives one checkable"
        " record of integer counts, and a folder of records gives a leaderboard.",
        prose.block("clbench run\nclbench list\nclbench report", "bash"),
        "## Guide",
        "\n".join(listed),
        "## What there is",
        prose.table(("page", "what it holds"), rows),
        f"Version {clbench.__version__}. Made from the code by `clbench site FOLDER`.",
    ]
    return "\n\n".join(parts) + "\n"


def navigation(made: Mapping[str, str]) -> list[Any]:
    """The tree beside the pages: every page stands in it."""
    families: dict[str, list[Any]] = {}
    for family, name, _ in learners.named():
        families.setdefault(family, []).append({name: f"learners/{name}.md"})

    def of(folder: str) -> list[Any]:
        found = sorted(file for file in made if file.startswith(f"{folder}/") and not file.endswith("/index.md"))
        return [{made[file].partition("\n")[0].lstrip("# ").removeprefix("Scenarios: "): file} for file in found]

    tree: list[Any] = [
        {"Home": "index.md"},
        {"Guide": [{topics.title(path): f"guide/{topic}.md"} for topic, path in topics.topics().items()]},
        {"Learners": ["learners/index.md", *({family: listed} for family, listed in families.items())]},
        {"Scenarios": ["scenarios/index.md", *of("scenarios")]},
        {"Choices": of("choices")},
        {"Python": ["api/index.md", *of("api")]},
    ]
    return [*tree, {"Commands": "commands.md"}] if "commands.md" in made else tree


def configuration(made: Mapping[str, str]) -> dict[str, Any]:
    """mkdocs.yml: no fonts and scripts from elsewhere, links and anchors that lead nowhere are warnings."""
    python = {
        "paths": [str(Path(clbench.__file__).resolve().parent.parent)],
        "options": {
            "show_root_heading": True,
            "show_root_full_path": False,
            "heading_level": 2,
            "show_source": False,
            "docstring_style": "google",
            "members_order": "source",
            "extensions": ["clbench.guide.site.griffe_docstrings"],
            "show_if_no_docstring": False,
            "separate_signature": True,
            "show_signature_annotations": True,
        },
    }
    looks = [
        {"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "indigo"},
        {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "indigo"},
    ]
    features = ["navigation.indexes", "navigation.prune", "navigation.top", "content.code.copy", "toc.follow"]
    return {
        "site_name": "clbench",
        "docs_dir": "pages",
        "site_dir": "html",
        "use_directory_urls": False,
        "theme": {"name": "material", "font": False, "palette": looks, "features": features},
        "extra_css": ["style.css"],
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": python}}}],
        "markdown_extensions": ["tables", {"toc": {"permalink": True}}, "pymdownx.highlight", "pymdownx.superfences"],
        "validation": {
            "nav": {"omitted_files": "warn", "not_found": "warn", "absolute_links": "warn"},
            "links": {"not_found": "warn", "anchors": "warn", "absolute_links": "warn", "unrecognized_links": "warn"},
        },
        "nav": navigation(made),
    }


def write(folder: Path, made: Mapping[str, str]) -> None:
    """Markdown under `folder`/pages, `mkdocs.yml` beside it; pages of an earlier writing that are no more are removed."""
    import yaml

    if folder.exists() and any(folder.iterdir()) and not (folder / "mkdocs.yml").is_file():
        raise UserError(f"{folder} holds something else: name a new folder, or one that `clbench site` made")
    shutil.rmtree(folder / "pages", ignore_errors=True)
    for file, text in {**made, "style.css": STYLE}.items():
        path = folder / "pages" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    write_text(folder / "mkdocs.yml", yaml.safe_dump(configuration(made), sort_keys=False))


def missing() -> list[str]:
    """Packages that the HTML needs and that are not installed."""
    found = []
    for name in NEEDED:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        found += [name] if spec is None else []
    return found


def build(folder: Path) -> Path:
    """Make `folder`/html of what `write` wrote -> its first page. `UserError` with mkdocs' warnings: each is an error."""
    if lacking := missing():
        raise UserError(f"HTML needs {', '.join(lacking)}: pip install 'clbench[docs]', or write Markdown alone with --pages")
    # not --quiet: a warning that is not shown is not counted by --strict either
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "-f", str(folder / "mkdocs.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}  # what the theme says of its future is no warning here
    done = subprocess.run(words, capture_output=True, text=True, env=quiet)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if not line.startswith("INFO")]
        raise UserError("\n".join(["mkdocs stopped:", *(line for line in said if line.strip())]))
    return folder / "html" / "index.html"
