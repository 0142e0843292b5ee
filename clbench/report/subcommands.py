"""`clbench report ...`: its pages, what each takes and what it says. Everything heavy is imported by the page that needs it."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import folder, formats, table
from clbench.report.columns import ACCURACY, LEADERBOARDS, extra
from clbench.report.formats import Table
from clbench.report.runs import Filter, scan

PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "explain": (
        "every average and forgetting formula, what others call it, its value on one matrix; the leaderboard's columns",
        (
            "clbench report explain",
            "clbench report explain 0123456789abcdef",
            "clbench report explain results/records/0123456789abcdef.json --part peers --format md",
            "clbench report explain --part columns",
        ),
    ),
    "compare": (
        "old results against new, or two learners: difference, interval, test, cost",
        (
            "clbench report compare 'old results' results",
            "clbench report compare slca mos --scenario cil_digits",
            "clbench report compare replay@3d40bb62 replay@39713288 --metric forgetting",
            "clbench report compare slca mos --format csv --part full --out compared.csv",
        ),
    ),
    "statistics": (
        "intervals and variance over class orders and seeds, all pairs of learners, profiles across scenarios",
        ("clbench report statistics", "clbench report statistics --scenario cil_digits --part pairs --format csv"),
    ),
    "core": (
        "the core suite: learners by streams over five orders, ranks with ties, and what is missing",
        (
            "clbench report core",
            "clbench report core --part missing",
            "clbench report core --part rows --format csv --out core.csv",
        ),
    ),
    "targets": (
        "seven findings on continual pre-training: which of them the runs show",
        ("clbench report targets", "clbench report targets --scenario 'cpt_text*' --format md"),
    ),
    "flips": (
        "what was right before an experience and wrong after it, and the other way round (needs save_predictions=true)",
        (
            "clbench report flips 0123456789abcdef",
            "clbench report flips results/records/*.json --part sets --format csv --out flips.csv",
        ),
    ),
    "predictions": (
        "the answers of every test sample of the chosen records as one parquet file (needs save_predictions=true)",
        (
            "clbench report predictions --out answers.parquet",
            "clbench report predictions --learner slca --scenario cil_digits --out answers.parquet",
        ),
    ),
    "external": (
        "scores in files of Every Eval Ever, of any library, as one table",
        ("clbench report external eee", "clbench report external model.json --format csv --out scores.csv"),
    ),
    "html": (
        "one page to open in a browser: table, ranks, figures, costs, what changed",
        (
            "clbench report html",
            "clbench report html --results-dir 'other results' --out page.html",
            "clbench report html --since old/leaderboard.csv",
        ),
    ),
    "plot": (
        "figures for a paper",
        ("clbench report plot", "clbench report plot curves cost --scenario cil_digits --format pdf --out figures"),
    ),
}
TRAVEL = ("parquet", "every-eval-ever")  # forms that leave clbench: files, not text
_FLAGS = ("--strict", "--standalone", "-h", "--help")  # options without a value


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The page among the words of `clbench report`, and the other words; '' where only options are given."""
    value = False
    for i, word in enumerate(words):
        if value or word.startswith("-"):
            value = not value and word not in _FLAGS and "=" not in word
            continue
        if word not in PAGES:
            raise UserError(f"clbench report has no page '{word}'{nearest(word, PAGES)} (one of: {', '.join(PAGES)})")
        return word, [*words[:i], *words[i + 1 :]]
    return "", list(words)


def overview() -> str:
    """The pages with a line each, for --help."""
    return "pages, each with --help:\n" + "\n".join(f"  {name:<11}{what}" for name, (what, _) in PAGES.items())


def add_arguments(parser: argparse.ArgumentParser, page: str) -> None:
    parser.set_defaults(page=page)
    parser.add_argument("--results-dir", default="results", metavar="DIR", help="where the records lie (results)")
    if page == "":
        parser.add_argument("--strict", action="store_true", help="exit 1 if a run failed, died, or a record is damaged")
    if page == "explain":
        parser.add_argument("record", nargs="?", help="a record's file or run id (none: a worked example)")
    if page == "external":
        parser.add_argument("files", nargs="+", metavar="FILE", help="JSON files, or folders of them")
    if page == "flips":
        parser.add_argument("records", nargs="+", metavar="RECORD", help="files of records, or run ids")
    if page == "compare":
        parser.add_argument("a", metavar="A", help="a results folder, or a learner (NAME or NAME@VARIANT)")
        parser.add_argument("b", metavar="B", help="the same, what A is compared with")
        parser.add_argument("--test", choices=("t", "sign-flip"), default="t", help="paired t-test, or sign flips (exact) (t)")
    if page in ("compare", "statistics"):
        words = "any number that `explain` names (last_macro, of pre-training final_loss)"
        parser.add_argument("--metric", help=words)
    if page == "core":
        _add_suite(parser)
    if page not in ("explain", "external", "flips", "html", "core"):
        for part in ("scenario", "learner", "model"):
            words = f"only this {part}; globs and repetition allowed"
            parser.add_argument(f"--{part}", action="append", default=[], metavar="NAME", help=words)
        words = "only records with this setting, such as learner.lr=0.03, seed=0, variant=5057*; repetition allowed"
        parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=words)
    _add_output(parser, page)


def _add_output(parser: argparse.ArgumentParser, page: str) -> None:
    """Where a page is written, and in which form."""
    if page == "html":
        parser.add_argument("--out", metavar="FILE", help="the file to write (DIR/report.html)")
        words = "an earlier leaderboard.csv, or the folder that holds it: the page says what changed"
        parser.add_argument("--since", metavar="FILE", help=words)
    elif page == "plot":
        parser.add_argument("kinds", nargs="*", metavar="KIND", help="which figures (all)")
        parser.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="(png)")
        parser.add_argument("--out", default="figures", metavar="DIR", help="the folder to write into (figures)")
    elif page == "predictions":
        from clbench.report.travel import answers_table

        parser.add_argument("--out", required=True, metavar="FILE", help="the parquet file to write")
        parser.epilog = f"{parser.epilog or ''}\n\ncolumns:\n{answers_table.schema_text()}"
    else:
        forms = (*formats.FORMS, *TRAVEL) if page == "" else formats.FORMS
        parser.add_argument("--format", choices=forms, help="how to print it (text, or what --out's suffix says)")
        parser.add_argument("--out", metavar="FILE", help="write it to a file")
        parser.add_argument("--standalone", action="store_true", help="with latex: a whole document")
        if page == "":
            words = "with every-eval-ever: who says so, as its files name the source (unknown)"
            parser.add_argument("--organization", metavar="NAME", help=words)
            parser.add_argument("--columns", metavar="A,B,...", help="these columns of the leaderboard, as they are in the CSV")
        else:
            parser.add_argument("--part", metavar="NAME", help="one table of the page")


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(results_dir="results/core")
    parser.add_argument("--suite", default="core_v1", metavar="NAME", help="the version (core_v1)")


def run(args: argparse.Namespace, conf: pathlib.Path) -> tuple[str, int]:
    """Do what `clbench report` was asked for -> (text, exit code). `conf` is the folder of configuration files."""
    results = pathlib.Path(args.results_dir).expanduser()
    if args.page == "html":
        from clbench.report.page import html

        out, since = (pathlib.Path(given).expanduser() if given else None for given in (args.out, args.since))
        return f"written {html.write(results, out, since)}", 0
    if args.page == "plot":
        return _plot(args, results)
    if args.page == "predictions":
        return _answers(args, results), 0
    if args.page == "" and (args.format in TRAVEL or str(args.out).endswith(".parquet")):
        return _travel(args, results), 0
    if args.page == "" and args.organization:
        raise UserError("--organization has no effect without --format every-eval-ever")
    form = formats.form_of(args.format, args.out)
    if args.standalone and form != "latex":
        raise UserError("--standalone has no effect without --format latex")
    if args.page == "":
        wanted = Filter(args.scenario, args.learner, args.model, args.where)
        if args.format or args.out or args.columns:
            text, code = _view(results, wanted, form, args)
            return _given(text, form, args), code
        text, code = folder.report(results, args.strict, wanted)
        if not wanted:
            from clbench.report import cards, suites

            text = "\n".join([text, *(f"written {path}" for path in [*cards.write(results, conf), *suites.write(results)])])
        return text, code
    tables = _tables(args, results)
    part = args.part
    if part is None and args.page == "compare" and form != "json":
        part = "full" if form == "csv" else "rows"
    if part is None and args.page == "flips" and form == "csv":
        part = "pairs"
    if part is None and args.page == "core" and form in ("text", "csv"):
        part = "core"
    return _given(formats.render(tables, form, part), form, args), 0


def _given(text: str, form: str, args: argparse.Namespace) -> str:
    """The text itself, or where it was written to."""
    text = formats.latex_document(text) if args.standalone else text
    if not args.out:
        return text
    path = pathlib.Path(args.out).expanduser()
    record.write_text(path, text + "\n")
    return f"written {path}"


def _tables(args: argparse.Namespace, results: pathlib.Path) -> list[Table]:
    if args.page == "explain":
        from clbench.report import explain

        made = explain.of_record(args.record, results) if args.record else explain.tables(explain.example())
        return made if args.part else [table for table in made if "columns" not in table.part]
    if args.page == "external":
        from clbench.report.travel import every_eval

        return [every_eval.read([pathlib.Path(file).expanduser() for file in args.files])]
    if args.page == "flips":
        from clbench.report import flips

        made = flips.tables(args.records, results)
        return made if args.part or formats.form_of(args.format, args.out) != "text" else made[:1]
    if args.page == "core":
        from clbench.report import suites

        return suites.tables(*suites.of_folder(results, args.suite))
    wanted = Filter(args.scenario, args.learner, args.model, args.where)
    if args.page == "compare":
        from clbench.report.compare import compare

        return compare(args.a, args.b, args.results_dir, wanted, args.metric, args.test)
    from clbench.report import numbers, overview

    if args.page == "targets":
        from clbench.report import targets

        return [targets.table(scan(results, wanted).runs)]
    if args.metric is not None:
        numbers.check_metric(args.metric)
    found = scan(results, wanted)
    if not found.runs:
        raise UserError(f"no records in {results / 'records'}")
    return overview.tables(found.runs, args.metric)


def _answers(args: argparse.Namespace, results: pathlib.Path) -> str:
    """The answers of the chosen records as parquet -> what was written."""
    from clbench.report.travel import answers_table

    out = pathlib.Path(args.out).expanduser()
    records, rows = answers_table.write(results, out, Filter(args.scenario, args.learner, args.model, args.where))
    return f"written {out}: {rows} answers of {records} records, counted against them"


def _travel(args: argparse.Namespace, results: pathlib.Path) -> str:
    """Records as parquet, or rows as files of Every Eval Ever -> what was written."""
    wanted = Filter(args.scenario, args.learner, args.model, args.where)
    form = args.format or "parquet"
    if form not in TRAVEL or args.columns or args.standalone or args.strict:
        raise UserError("parquet and every-eval-ever take --out, filters and --organization alone")
    if args.organization and form == "parquet":
        raise UserError("--organization has no effect without --format every-eval-ever")
    if not args.out:
        raise UserError(f"--format {form} needs --out {'FILE' if form == 'parquet' else 'FOLDER'}")
    out = pathlib.Path(args.out).expanduser()
    if form == "parquet":
        from clbench.report.travel import parquet

        made = parquet.rows(results, wanted)
        parquet.write(made, out)
        return f"written {out}: {len(made)} records"
    import time

    from clbench.report.board import rank
    from clbench.report.travel import every_eval

    found = scan(results, wanted)
    groups = rank(found.runs, ACCURACY, found.dead)
    files = every_eval.write(groups, out, args.organization or "unknown", int(time.time()))
    if not files:
        raise UserError(f"no accuracies in {results / 'records'}: losses and edits have no place in that form")
    return f"written {len(files)} files under {out}"


def _plot(args: argparse.Namespace, results: pathlib.Path) -> tuple[str, int]:
    from clbench.report.figures import plots

    wanted = Filter(args.scenario, args.learner, args.model, args.where)
    made = plots.write(results, pathlib.Path(args.out).expanduser(), args.kinds, args.format, wanted)
    return "\n".join(f"written {path}" for path in made), 0


def _view(results: pathlib.Path, wanted: Filter, form: str, args: argparse.Namespace) -> tuple[str, int]:
    """The leaderboards in one format; what is wrong with the folder goes to stderr, so that the output stays a table."""
    found = scan(results, wanted)
    if not found.runs:
        raise UserError(f"no records in {results / 'records'}")
    for line in folder.troubles(found)[1:]:
        print(f"clbench: {line}", file=sys.stderr)
    boards = {board: table.rows_of(found.runs, board, found.dead) for board in LEADERBOARDS}
    boards = {board: made for board, made in boards.items() if made}
    if len(boards) > 1 and (form == "csv" or args.columns):
        hint = "choose with --scenario, or --where kind=continual_pretraining"
        raise UserError(f"accuracies, losses and edits are tables of their own: {hint}")
    chosen = {board: _chosen(args.columns, (*board.columns, *extra(made))) for board, made in boards.items()}
    if form == "csv":
        text = "\n".join(table.csv_of(made, board, chosen[board]).rstrip("\n") for board, made in boards.items())
    elif form == "json" or args.columns:
        digits = {name: 1 for board in boards for name in board.columns if name.startswith(("seconds", "peak"))}
        tables = [Table(board.part, "", chosen[board], made, (), digits) for board, made in boards.items()]
        text = formats.render(tables, form)
    elif form == "text":
        text = "\n\n".join(table.table_text(made, board) for board, made in boards.items())
    else:
        text = formats.render([part for board, made in boards.items() for part in table.for_people(made, board)], form)
    return text, 1 if args.strict and folder.is_bad(found) else 0


def _chosen(words: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if words is None:
        return known
    names = tuple(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UserError(f"no column {name!r}{nearest(name, known)} (clbench report explain --part columns)")
    if not names:
        raise UserError("--columns names no column")
    return names
