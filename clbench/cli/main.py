"""The command line: parsers, dispatch, exit codes. The work is in `commands`.

Nothing here loads torch, so a mistyped word is answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from clbench import __version__
from clbench.cli.help_text import ABOUT, EXAMPLES
from clbench.config.registry import conf_dir
from clbench.config.signatures import nearest
from clbench.guide import topics
from clbench.interfaces import UserError
from clbench.training import torchrun

MODULES = {  # commands that a module of their own adds arguments to and runs; it is loaded for them alone
    "predict": "clbench.cli.predict_command",
    "schedule": "clbench.cli.schedule_command",
    "schedule fit": "clbench.cli.schedule_fit",
    "manifest": "clbench.cli.manifest_command",
    "manifest corpus": "clbench.cli.corpus_command",
    "orders": "clbench.studies.orders",
    "effects": "clbench.studies.effects",
    "site": "clbench.cli.site_command",
    "submit": "clbench.cli.submit_command",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s with the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0]
            options = [option for action in self._actions for option in action.option_strings]
            message = f"no option {word}{nearest(word.split('=')[0], options)}"
        raise UserError(f"{message} ({self.prog} --help shows what there is)")


def overview() -> str:
    """What `clbench` alone says."""
    lines = [ABOUT, "commands, each with --help:"]
    for name, (what, examples) in EXAMPLES.items():
        lines += [f"  {name:<8} {what}", f"  {'':<9}  {examples[0]}"]
    lines += ["", "pages of the guide (clbench help TOPIC):"]
    lines += [f"  {topic:<18} {topics.title(path)}" for topic, path in topics.topics().items()]
    return "\n".join(
        [*lines, "", "start here:  clbench run        (digits, 5 experiences, under a minute, nothing to download)"]
    )


def options_text() -> str:
    """The options of every run with their defaults and remarks, from run.yaml itself."""
    text = (conf_dir() / "run.yaml").read_text(encoding="utf-8")
    lines = text[text.index("\nseed:") : text.index("\nhydra:")].strip().splitlines()
    rows = [line.replace(": ", "=", 1).partition("  # ") for line in lines]
    return "\n".join(f"  {name:<24}{remark}".rstrip() for name, _, remark in rows)


def described(name: str, page: str) -> tuple[str, tuple[str, ...]]:
    """What a command, or a page of `report`, is for, and examples of it."""
    what, examples = EXAMPLES[name]
    if name != "report":
        return what, examples
    from clbench.report import subcommands

    return subcommands.PAGES[page] if page else (f"{what}\n\n{subcommands.overview()}", examples)


def epilog_of(name: str, examples: Sequence[str]) -> str:
    """What stands below the options of a command: what there is to choose, and examples."""
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    if name in ("run", "plan"):
        groups = "choices: scenario=, learner=, model=, schedule=, pet=, machine=, sweep=   (clbench list shows the names)"
        epilog = f"{groups}\n\noptions and their defaults:\n{options_text()}\n\n{epilog}"
    if name == "tune":
        from clbench.tuning.options import overview as study

        epilog = f"{study()}\n\n{epilog}"
    if name == "bench":
        from clbench.bench.options import overview as measures

        epilog = f"{measures()}\n\n{epilog}"
    return epilog


def parser_of(name: str, page: str = "") -> Parser:
    """The parser of one command; `page` is a page of `report`."""
    what, examples = described(name, page)
    parser = Parser(
        f"clbench {name} {page}".rstrip(),
        description=what,
        epilog=epilog_of(name, examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_arguments(parser, name, page)
    return parser


def _add_arguments(parser: Parser, name: str, page: str) -> None:
    if name in ("run", "plan"):
        parser.add_argument("-m", "--multirun", action="store_true", help="several runs: NAME=A,B,C; range(a,b); glob(*)")
    if name == "run":
        parser.add_argument("--cfg", choices=("job",), help="print the resolved configuration instead of running it")
    if name in ("run", "plan", "check", "tune"):
        parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="choices and options (Hydra overrides)")
    if name == "check":
        parser.add_argument(
            "--measure", action="store_true", help="print what learners hold a class and an experience, as JSON"
        )
    if name == "list":
        parser.add_argument("groups", nargs="*", metavar="GROUP", help="scenarios, learners, models, schedules, pets, ...")
    if name == "report":
        from clbench.report.subcommands import add_arguments

        add_arguments(parser, page)
    if name == "verify":
        from clbench.cli import verify_command

        verify_command.add_arguments(parser)
    if name in MODULES:
        importlib.import_module(MODULES[name]).add_arguments(parser)
    if name == "bench":
        from clbench.bench.options import add_arguments as add_measures

        add_measures(parser)
    if name == "bench tokens":
        from clbench.bench.token_options import add_arguments as add_paces

        add_paces(parser)
    if name == "new":
        parser.add_argument("kind", choices=("learner", "scenario", "operator", "evaluator"))
        parser.add_argument("name", help="a Python name in lower case, such as my_method")
        parser.add_argument("--to", default=".", metavar="DIR", help="the folder to write the package into (here)")


def launch(overrides: Sequence[str], jobs: Sequence[list[str]] | None, job: Any) -> None:
    """Give a sweep to Hydra's launcher, which calls `job(config)` for each of its runs.

    `jobs`: overrides of each; None: a search, whose sweeper chooses them.
    """
    import hydra

    from clbench.config import sweeper
    from clbench.config.compose import behaviour, register

    register()
    old = sys.argv
    sys.argv = ["clbench", "-m", *overrides]
    try:
        with sweeper.given(jobs):
            hydra.main(config_path=str(conf_dir()), config_name="run", **behaviour())(job)()
    finally:
        sys.argv = old


def show_help(topic: str) -> int:
    """Show what there is, the help of a command, or a page of the guide -> exit code."""
    if not topic:
        print(overview())
    elif topic in EXAMPLES:
        print(parser_of(topic).format_help(), end="")
    else:
        print(topics.read(topic), end="")
    return 0


def dispatch(argv: Sequence[str]) -> int:
    """Find the command and do it -> exit code. Raises `UserError` for what the user can mend."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        return show_help(" ".join(argv[1:]))
    if argv[0] in ("-V", "--version"):
        print(f"clbench {__version__}")
        return 0
    name, *rest = argv
    if tuple(argv[:2]) in (("manifest", "corpus"), ("bench", "tokens"), ("schedule", "fit")):
        name, rest = " ".join(argv[:2]), rest[1:]
    if name not in EXAMPLES:
        kind = "option" if name.startswith("-") else "command"
        hint = nearest(name, EXAMPLES) if kind == "command" else nearest(name, ("--help", "--version"))
        if "=" in name:
            hint = f"; did you mean 'clbench run {name}'?"
        raise UserError(f"no {kind} '{name}'{hint} (one of: {', '.join(EXAMPLES)})")
    page = ""
    if name == "report":
        from clbench.report.subcommands import split

        page, rest = split(rest)
    args = parser_of(name, page).parse_intermixed_args(rest)
    args.command_line = ["clbench", *argv]
    torchrun.check_single_run(name, getattr(args, "multirun", False))
    from clbench.cli import commands

    if name == "run":
        return commands.run(args, args.command_line, launch)
    if name == "tune":
        from clbench.tuning import study

        return study.run(args, args.command_line)
    if name in ("bench", "bench tokens"):
        from clbench.bench import command

        text, code = command.run(args) if name == "bench" else command.run_tokens(args)
        print(text)
        return code
    if name in MODULES:
        return importlib.import_module(MODULES[name]).run(args)
    work = {
        "plan": commands.plan,
        "list": commands.show_choices,
        "check": commands.measure if name == "check" and args.measure else commands.check,
        "report": commands.report,
        "verify": commands.verify,
        "new": commands.new,
    }
    return work[name](args)


def answer(argv: Sequence[str]) -> int:
    """`dispatch`, with errors as lines on stderr -> exit code: 2 for a mistake of the user, 130 after Ctrl-C."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        torchrun.delay_nonzero_ranks()
        for line in str(error).splitlines():
            print(f"clbench: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clbench: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def openmp_environment(argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """OpenMP spin count or wait policy, as environment variables for torch to load OpenMP with; the user's own win.

    Between two layers of a network lie microseconds: threads that sleep there cost a forward pass a third of its speed. Threads
    that spin take the cores from jobs on the same machine, which are ten times slower then: there the policy is passive.
    """
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return {}
    where = [word.partition("=")[2] for word in argv if word.lstrip("+").startswith(("machine=", "hydra/launcher="))]
    alone = all(name in ("local", "basic", "slurm", "slurm_parallel") for name in where)
    return {"GOMP_SPINCOUNT": "10000"} if alone else {"OMP_WAIT_POLICY": "PASSIVE"}


def main() -> NoReturn:
    """Entry point of the `clbench` command."""
    os.environ |= openmp_environment(sys.argv[1:], os.environ)
    sys.exit(answer(sys.argv[1:]))
