"""Help texts of clbench and its commands. Imports nothing."""

from __future__ import annotations

ABOUT = """\
clbench measures continual learning: a scenario x a learner x a model x a seed gives one checkable record,
and a folder of records gives a leaderboard.
"""

EXAMPLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": (
        "learn, evaluate, write a record; done runs are skipped, killed ones go on",
        (
            "clbench run",
            "clbench run learner=ncm seed=1 device=cpu num_threads=2",
            "clbench run learner.lr=0.03 schedule=cosine scenario.budget.epochs=10",
            "clbench run -m learner=finetune,joint,ncm,replay,slca seed=0,1,2",
            "clbench run -m 'learner=glob(*)' machine=joblib hydra.launcher.n_jobs=4",
            "clbench run sweep=default_table",
            "clbench run learner._target_=my_file.MyLearner learner.lr=0.1",
        ),
    ),
    "plan": (
        "what `run` with the same words would do: jobs, their state, time and disk; errors of all jobs at once",
        ("clbench plan -m learner=finetune,slca 'seed=range(0,5)'", "clbench plan sweep=default_table"),
    ),
    "list": (
        "what can be chosen, with a line each; plug-ins included; of learners: paper, capabilities, bytes held",
        ("clbench list", "clbench list learners", "clbench list scenarios models"),
    ),
    "check": (
        "run the contract suite on a learner or a scenario",
        (
            "clbench check learner=slca",
            "clbench check learner._target_=my_file.MyLearner",
            "clbench check scenario=cil_digits",
            "clbench check --measure 'learner=glob(*)'",
        ),
    ),
    "report": (
        "records in, leaderboard and reproduction cards out",
        (
            "clbench report",
            "clbench report --results-dir 'other results' --strict",
            "clbench report --scenario 'cil_*' --where learner.lr=0.03",
            "clbench report --scenario cil_digits --format latex --out table.tex",
        ),
    ),
    "verify": (
        "check records: schema, counts, identity, stream, weights; repeat the beginning of some",
        (
            "clbench verify",
            "clbench verify results/records/0123456789abcdef.json",
            "clbench verify --rerun results/records/0123456789abcdef.json",
            "clbench verify results --rerun 3 --seed 1",
            "clbench verify --schema",
        ),
    ),
    "predict": (
        "answers of a finished run's learner for new images, as CSV; the run needs save_model=true",
        (
            "clbench predict results/records/0123456789abcdef.json photos",
            "clbench predict results/records/0123456789abcdef.json photos --top 3 --out answers.csv",
        ),
    ),
    "bench": (
        "how fast it is here: rates, seconds by phase, share of the floor, ratio to naive code",
        (
            "clbench bench",
            "clbench bench --learners ncm,mos --scenario cil_cifar100 --model vit_tiny scenario.num_classes=20",
            "clbench bench --preset cpu_targets",
            "clbench bench --preset vit_base_h200 --stand-ins",
            "clbench bench scaling --learners ncm,ease --experiences 5,10,20",
            "clbench bench startup",
        ),
    ),
    "bench tokens": (
        "tokens per second of pre-training beside a bare loop, ways to compute a step, memory of large corpora",
        (
            "clbench bench tokens --threads 1",
            "clbench bench tokens --rows paths --compile",
            "clbench bench tokens --rows loop --model decoder_124m --device cuda --precision bf16"
            " --compile --batch 32 --context 1024",
            "clbench bench tokens --rows loop --model pythia_410m --device cuda --precision bf16"
            " --compile --batch 16 --context 2048",
        ),
    ),
    "new": (
        "write a package of your own with a learner, scenario, operator or evaluator that runs at once",
        ("clbench new learner my_method", "clbench new scenario my_stream --to ~/code", "clbench new operator my_change"),
    ),
    "schedule": (
        "learning-rate schedules as a table, a sketch and a figure, with what predictors say of them",
        (
            "clbench schedule show cosine infinite wsd",
            "clbench schedule show wsd wsd@short wsd@short.anneal=0.1 --experiences 3 --out wsd.svg",
        ),
    ),
    "schedule fit": (
        "a law of the loss in the rates, fitted to the curves of one's own runs, with its error on schedules held out",
        (
            "clbench schedule fit results/records --scenario cpt_synthetic",
            "clbench schedule fit a.json b.json --held-out c.json --out law.json",
            "clbench schedule fit results/records/RUN_ID.json --refine        (the run had gradient_norms=l1)",
            "clbench schedule show cosine wsd linear --steps 390 --lr 0.003 --fitted law.json",
        ),
    ),
    "tune": (
        "choose options without the data that they are judged by, freeze the choice, evaluate it once",
        (
            "clbench tune scenario.num_classes=6 'learner.lr=tag(log,interval(0.001,0.1))' tune.trials=10",
            "clbench tune learner=fecam tune.space=fecam tune.protocol=first_experience seed=0,1,2",
            "clbench tune learner=ncm learner.metric=euclidean,cosine tune.sampler=grid tune.protocol=validation",
            "clbench tune scenario=cil_cifar100 tune.on=cil_digits tune.scenario.budget.epochs=20 tune.space=slca",
            "clbench tune learner=replay tune.space=replay tune.protocol=test results_dir=cheating",
        ),
    ),
    "orders": (
        "run learners on a stream in many orders of its experiences: spread, extremes, and whether similarity predicts them",
        (
            "clbench orders learner=finetune,replay scenario.num_classes=5 scenario.increment=1 --orders all",
            "clbench orders learner=slca scenario=cil_cifar100 --orders 24 seed=0,1,2",
            "clbench orders learner=rewarm_replay,dapt scenario=cpt_chain --orders 6 --keep 1",
        ),
    ),
    "effects": (
        "what the literature says a setting does, shown on small streams: runs, claims, and whether each holds over seeds",
        ("clbench effects --list", "clbench effects noise repetition --seeds 5 results_dir=out"),
    ),
    "manifest": (
        "write, check or show the exact stream of a scenario; check decodes its images",
        (
            "clbench manifest show scenario=cil_digits",
            "clbench manifest write scenario=cil_digits scenario.order=random --out stream.json",
            "clbench manifest check stream.json",
            "clbench manifest check scenario=cil_folder scenario.dataset=./photos",
        ),
    ),
    "manifest corpus": (
        "texts into folders of token shards, which scenarios of texts read",
        (
            "clbench manifest corpus build novels.txt --out data/novels",
            "clbench manifest corpus build web.jsonl.gz --field content --tokenizer tokenizer.json --out data/web",
            "clbench manifest corpus check data/novels data/web",
        ),
    ),
    "submit": (
        "check records, flag what is odd, and pack them with the text of a pull request; --check opens such an archive",
        (
            "clbench submit out --against results --out mine.zip",
            "clbench submit out --learner my_method --rerun 1 --sign ~/.ssh/id_ed25519 --out mine.zip",
            "clbench submit --check mine.zip --signers allowed_signers",
        ),
    ),
    "site": (
        "the guide, a page for each thing that can be chosen, and the Python names, as static HTML (extra: clbench[docs])",
        ("clbench site public", "clbench site public --pages"),
    ),
}
