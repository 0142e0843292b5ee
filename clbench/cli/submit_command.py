"""`clbench submit`: records into an archive with the text of a pull request, and such an archive checked.

Nothing is sent anywhere. Only `--rerun` loads torch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from clbench.cli import verify_command
from clbench.config import registry
from clbench.interfaces import UserError
from clbench.records.verify import Verdict, verdicts
from clbench.report.runs import Filter
from clbench.report.travel import archive, submission


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="?", metavar="RESULTS", help="the folder whose records are handed in")
    parser.add_argument("--check", metavar="ARCHIVE", help="open an archive instead: checksums, records, signature, flags")
    words = "a results folder with the rows and cards to stand beside (results, where it is there and not RESULTS)"
    parser.add_argument("--against", metavar="DIR", help=words)
    parser.add_argument("--out", metavar="FILE", help="the archive to write (RESULTS.zip)")
    for part in ("scenario", "learner", "model"):
        words = f"only this {part}; globs and repetition allowed"
        parser.add_argument(f"--{part}", action="append", default=[], metavar="NAME", help=words)
    words = "only records with this setting, such as variant=5057*; repetition allowed"
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=words)
    words = "run the beginning of N drawn records again and compare every count (0)"
    parser.add_argument("--rerun", type=int, default=0, metavar="N", help=words)
    words = "pack the answers of every test sample too, of the records that have them (save_predictions=true)"
    parser.add_argument("--predictions", action="store_true", help=words)
    parser.add_argument("--data-root", metavar="DIR", help="where data and weights lie (the environment's CLBENCH_DATA)")
    parser.add_argument("--sign", metavar="KEY", help="sign the list of checksums with this SSH key (ssh-keygen -Y sign)")
    parser.add_argument("--signers", metavar="FILE", help="with --check: allowed signers, as ssh-keygen reads them")


def run(args: argparse.Namespace) -> int:
    """Pack or check -> 0, or 1 where a checked archive holds a record that contradicts itself."""
    if args.check is not None:
        if args.results is not None or args.sign or args.out or args.predictions:
            raise UserError("--check ARCHIVE stands alone: RESULTS, --sign, --predictions and --out have no effect with it")
        return check(args)
    if args.results is None:
        raise UserError("say which results folder is handed in: clbench submit RESULTS (or --check ARCHIVE)")
    if args.signers:
        raise UserError("--signers has no effect without --check")
    results = Path(args.results).expanduser()
    out = Path(args.out).expanduser() if args.out else results.with_name(f"{results.name}.zip")
    made = _gathered(results, args)
    key = Path(args.sign).expanduser() if args.sign else None
    held = submission.files(made, results, registry.conf_dir(), args.predictions)
    archive.pack(held, out, key)
    print(submission.summary(made))
    signed = ", signed" if key is not None else ""
    print(f"written {out}: {_counted(held)}{signed}; PULL_REQUEST.md in it is the text to send with it")
    return 0


def _gathered(results: Path, args: argparse.Namespace) -> submission.Submission:
    """Everything checked; records are run again where that is asked for."""
    if args.rerun < 0:
        raise UserError("--rerun needs a number from 0")
    if not (results / "records").is_dir():
        raise UserError(f"{results} is no results folder: it has no folder records")
    against = Path(args.against).expanduser() if args.against else Path("results")
    if args.against and not (against / "records").is_dir():
        raise UserError(f"--against {args.against} is no results folder: it has no folder records")
    if not (against / "records").is_dir() or against.resolve() == results.resolve():
        against = None
    checked = verdicts(results, args.data_root)
    repeated: list[Verdict] = []
    if args.rerun:
        repeated = verify_command.repeated(results, args.rerun, 0, args.data_root)
    wanted = Filter(args.scenario, args.learner, args.model, args.where)
    return submission.gather(results, wanted, checked, repeated, against, datetime.now(UTC))


def _counted(held: dict[str, bytes]) -> str:
    counts = Counter(name.partition("/")[0] for name in held if "/" in name)
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))


def check(args: argparse.Namespace) -> int:
    """Open an archive and say what it is worth -> exit code."""
    path = Path(args.check).expanduser()
    held = archive.unpack(path)
    by = archive.signature(held, Path(args.signers).expanduser() if args.signers else None)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "handed_in"
        for name, data in held.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        found = verdicts(root, args.data_root)
        made = _gathered(root, args) if all(v.verdict != "failed" for v in found) else None
    bad = [v for v in found if v.verdict == "failed"]
    for one in bad:
        print(verify_command.line(one))
    if made is not None:
        print(submission.summary(made))
    print(f"{path}: {_counted(held)}; {len(bad)} failed; {_signed(by)}")
    return 1 if bad else 0


def _signed(by: archive.Signature | None) -> str:
    if by is None:
        return "not signed"
    known = f"{by.name} (" if by.name else "an unknown holder of ("
    return f"signed by {known}{by.key}), who vouches for these bytes: not a proof that they are true"
