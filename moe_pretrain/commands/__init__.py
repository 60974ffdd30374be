"""One file for each command: ``arguments(parser)`` adds its options, ``run(options)`` returns its exit code."""

COMMANDS = {
    "plan": ("plan", "parameters, FLOPs, memory per rank, traffic, time; starts nothing"),
    "prepare": ("prepare", "tokenise the corpus ahead of train, into the same cache; --check compares checksums"),
    "train": (
        "train",
        "train a model; the same run.name again resumes; --multirun router=top_k,top_p seed=1,2: a sweep",
    ),
    "tune": (
        "tune",
        "the same number of trials of the learning rate for every scheme, then runs of each at its best; resumable",
    ),
    "sweep-status": ("sweep_status", "how far the jobs of a sweep are, from another terminal too"),
    "verify": ("verify", "compare the training step of this configuration, shrunk, with a one-process oracle"),
    "certify": ("certify", "what a scheme must do, PASS or FAIL: your own with router_file=PATH, or those of a FOLDER"),
    "inspect": ("inspect", "what a checkpoint holds and where it comes from, and whether its checksums are right"),
    "report": ("report", "one run as a self-contained HTML page"),
    "compare": ("compare", "all runs below a folder, variant against variant"),
    "ladder": ("ladder", "loss over size and tokens of a folder's runs: exponents, optimum, which gains survive scale"),
    "wandb": ("wandb", "wandb's offline files of all runs below a folder, written anew from their metrics"),
    "specialise": ("specialise", "information between experts and what their tokens are, in bits"),
    "export": ("export", "a run as a folder that transformers loads, checked by its logits; every routing scheme"),
    "generate": ("generate", "text from a run as it comes: temperature, top-k, top-p, seed; decode=self_contrast"),
    "average": ("average", "the mean of a run's last checkpoints, as a checkpoint of a run of its own"),
    "prune": ("prune", "a run with fewer experts: seven methods, with the loss before and after each"),
    "upcycle": ("upcycle", "a dense run, or a Llama folder, as a mixture of experts that starts with its loss"),
    "evaluate": ("evaluate", "loss and bits per byte of a run on any text; tasks of lm-evaluation-harness"),
    "completion": ("completion", "completion of commands, options and choices for bash or zsh"),
}
"""Command -> (its module in this package, imported when it runs; one line of help)."""
