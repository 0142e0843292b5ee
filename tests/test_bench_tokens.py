"""The bench of pre-training runs at small sizes, and says what it must; its numbers are the machine's affair."""

import json
import re

import numpy as np
import pytest

from clbench.bench import mapped, table, token_options, tokens
from clbench.bench.tokens import TARGETS, model_of, stream_of
from clbench.cli.main import answer, parser_of
from clbench.config.registry import choices
from clbench.interfaces import UserError
from clbench.streams.tokens import sequences
from clbench.training.pretraining.ledger import flops_per_token

SMALL = ("--batch", "4", "--context", "16", "--warm", "1", "--steps", "2", "--rounds", "3", "--threads", "1")


def options(words):
    """The options as the command line gives them."""
    args = parser_of("bench tokens").parse_args(list(words))
    token_options.check(args)
    return args


def test_the_loops_side_by_side(tmp_path, capsys):
    words = [*SMALL, "--rows", "loop,paths", "--results-dir", str(tmp_path / "my results"), "--name", "mine"]
    assert answer(["bench", "tokens", *words]) == 0
    shown = capsys.readouterr().out
    made = json.loads((tmp_path / "my results" / "bench" / "mine.json").read_text())
    assert [row["row"] for row in made["loop"]] == ["bare", "clbench", "clbench with probes"]
    assert made["loop"][0]["of_bare"] == 1.0 and all(len(row["rounds"]) == 3 for row in made["loop"])
    names = [row["row"].removesuffix("  <- fastest") for row in made["paths"]]
    assert names == [f"{a} {p}" for a in ("explicit", "sdpa") for p in ("fp32 highest", "fp32 medium", "bf16 highest")]
    assert sum("fastest" in row["row"] for row in made["paths"]) == 1
    assert made["machine"]["threads"] == 1 and {"cpu", "cores", "versions", "load"} <= set(made["machine"])
    assert made["options"]["batch"] == 4 and "matmul" in made["flags"]
    assert "tokens_per_second" in shown and re.search(r"clbench with probes +\d+ +[01]\.\d+", shown)


@pytest.mark.parametrize(("context", "read"), [("1023", "0.1"), ("64", "0.03")])
def test_memory_of_a_corpus_of_gigabytes_stays_flat(context, read):
    """Short sequences too: each makes 64 kB around it resident."""
    args = options(["--rows", "memory", "--context", context, "--batch", "16", "--corpus-gb", "10", "--read-gb", read])
    (row,) = mapped.rows(args)
    assert row["grown_mb"] < 30 and row["tokens_per_second"] > 0


def test_a_mapped_file_reads_the_same_as_an_array(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1 << 16, 200_000, np.uint16)
    tokens.tofile(tmp_path / "x")
    mapped, ids = np.memmap(tmp_path / "x", "<u2", "r"), np.arange(sequences.count(len(tokens), 64))
    for _ in range(100):  # beyond what may stay resident
        assert np.array_equal(sequences.windows(mapped, ids, 64), sequences.windows(tokens, ids, 64))


def test_shapes_of_the_targets():
    """The operations per token from which the targets are 40 % of an H200's 989 Tera: 2.73e9 and 8.55e8."""
    assert set(TARGETS) <= set(choices("model"))
    for name, wanted in (("pythia_410m", 2.73e9), ("decoder_124m", 8.55e8)):
        import torch

        with torch.device("meta"):
            from clbench.models.decoder import Decoder, Shape

            shape = {"pythia_410m": (50304, 1024, 24, 16, 2048, 4096), "decoder_124m": (50304, 768, 12, 12, 1024, 3072)}[name]
            model = Decoder(Shape(*shape, tied=name == "decoder_124m"))
        assert flops_per_token(model, shape[4]) == pytest.approx(wanted, rel=0.01)
        assert TARGETS[name] == pytest.approx(0.4 * 989e12 / wanted, rel=0.01)


def test_a_stream_of_random_tokens():
    made = stream_of(64, 8, 4, 10)
    assert made.manifest.experiences[0]["steps"] == 10 and made.domains[0].train.max() < 64
    assert model_of("decoder_tiny", 99, 8).shape.vocab == 99


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "lop"], "no table 'lop'; did you mean 'loop'"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--corpus-gb", "0"], "must be above 0"),
        (["--model", "decoder_tny", "--rows", "loop"], "did you mean 'decoder_tiny'"),
        (["--model", "nano", "--rows", "loop"], "no decoder 'nano'"),
        (["--threads", "many"], "num_threads must be"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(UserError, match=message):
        tokens.measure(parser_of("bench tokens").parse_args(words))


def test_a_table_leaves_out_what_no_row_has():
    rows = [{"row": "a", "x": None, "y": 1, "rounds": [1]}, {"row": "bb", "x": None, "y": None, "rounds": [2]}]
    assert table.plain(rows) == "row  y\na    1\nbb"
