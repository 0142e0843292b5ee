"""Edits from files of CounterFact and zsRE on a checkpoint in the layout of Pythia's, with its tokenizer: whole runs."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import save_file

from clbench.config import compose
from clbench.evaluation import edit_metrics
from clbench.models.decoder import build_decoder
from clbench.records import record, verify
from clbench.run.runner import run_job

SHAPE = {"width": 32, "depth": 3, "heads": 4, "vocab": 420, "context": 64}  # more words than the tokenizer has, as Pythia's
TEXT = "The tower of the old town lies in the north of the land. Who wrote the book of it? Rome or Paris, blue or red? "
PLACES = ("The tower", "The bridge", "The old mill")


def counterfact(subject):
    asked = {"prompt": "{} lies in", "subject": subject, "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"}}
    near = ["The Louvre lies in", "The Pantheon lies in"]
    return {"requested_rewrite": asked, "paraphrase_prompts": [f"Where is {subject}? In"], "neighborhood_prompts": near}


def zsre(subject):
    return {"subject": subject, "src": f"What colour is {subject}?", "rephrase": f"{subject} has which colour?",
            "answers": ["red"], "alt": "blue", "loc": "nq question: who wrote the book", "loc_ans": "Ann"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records, old text, a tokenizer, and a checkpoint as on the hub: half precision, buffers, names with a prefix."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: text)")
    made: pathlib.Path = tmp_path_factory.mktemp("hub")
    (made / "counterfact.json").write_text(json.dumps([counterfact(one) for one in PLACES]))
    (made / "zsre.json").write_text(json.dumps([zsre(one) for one in PLACES]))
    (made / "old.txt").write_text(TEXT * 60)
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    encoder.train_from_iterator([TEXT] * 3, tokenizers.trainers.BpeTrainer(**options))
    encoder.save(str(made / "tokenizer.json"))
    point = made / "point"
    point.mkdir()
    model = build_decoder(name="made", seed=3, **SHAPE)
    state = {f"gpt_neox.{k}" if k != "embed_out.weight" else k: (4 * v).half() for k, v in model.state_dict().items()}
    for i in range(SHAPE["depth"]):
        state[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9).half()
        state[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(1).half()
    save_file(state, point / "model.safetensors")
    config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0}
    config |= {"hidden_act": "gelu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 128}
    config |= {"layer_norm_eps": 1e-05, "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    config |= {"rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16"}
    config |= {"use_cache": True, "use_parallel_residual": True, "vocab_size": 420}
    (point / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("layout", ["counterfact", "zsre"])
@pytest.mark.parametrize("learner", ["grace", "rome"])
def test_edits_of_a_checkpoint(folder, tmp_path, layout, learner):
    words = [f"scenario=edit_{layout}", f"learner={learner}", "model=pythia_70m", "model.weights=point", "on_error=raise"]
    words += [f"model.{name}={value}" for name, value in SHAPE.items()]
    words += [f"scenario.path={layout}.json", "scenario.corpus=old.txt", "scenario.tokenizer=tokenizer.json"]
    words += [
        "scenario.edits=3",
        "scenario.looks=[1,3]",
        "scenario.context=32",
        f"data_root={folder}",
        f"results_dir={tmp_path}",
    ]
    words += {
        "rome": ["learner.layer=1", "learner.contexts=2", "learner.context=4", "learner.steps=60"],
        "grace": ["learner.radius=0"],
    }[learner]
    (job,) = compose.compose(words)
    outcome = run_job(job)
    assert outcome.status == "ok", outcome.text
    found = record.read(outcome.path)
    assert found["model"]["source"] == "point" and len(found["model"]["file_sha256"]) == 64
    assert found["scenario"]["experiences"][1]["num_train"] == 2
    numbers = edit_metrics.summary(found)
    answers = [row["sums"] for row in found["rows"] if row["evaluator"] == "edit_success"]
    assert not any(v for v, kind in zip(answers[0]["correct"], found["probe"], strict=True) if kind == "edits")
    first = found["probe"].index("edits")
    assert answers[1]["nats"][first] < answers[0]["nats"][first] - 0.5, "the first edit is likelier after it"
    if learner == "grace":
        assert numbers["weight_drift"] == 0 and numbers["old_loss_rise"] == 0
        assert numbers["reliability"] == 1 and numbers["locality"] == 1
    else:
        assert numbers["weight_drift"] > 0
    (verdict,) = verify.verdicts(tmp_path)
    assert all("point" in reason for reason in verdict.reasons) and verdict.verdict == "self-reported", "weights are elsewhere"
    assert str(folder) not in outcome.path.read_text(), "no folder of a machine"
