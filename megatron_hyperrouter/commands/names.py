"""The commands of ``mhr`` in groups, with a summary and the module of each.

A command is one file with ``main(arguments)`` in one of the folders next to this file.  The help of
``mhr`` only reads this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """One command of ``mhr``."""

    module: str  # below megatron_hyperrouter.commands
    summary: str


GROUPS: dict[str, dict[str, Command]] = {
    "Train": {
        "train": Command("training.train", "pretrain a GPT-style mixture-of-experts model"),
    },
    "Clusters": {
        "plan": Command("cluster.plan", "find parallel layouts in which a model fits on N GPUs"),
        "doctor": Command("cluster.doctor", "check the machines of a job before the job trains"),
        "status": Command("cluster.status", "show the state of a run: step, speed, ETA, slow ranks"),
    },
    "Data": {
        "corpus": Command("data.corpus", "turn the text files in a folder into JSON lines"),
        "tokenizer": Command("data.tokenizer", "train a byte-level BPE tokenizer"),
        "preprocess": Command("data.preprocess", "turn text into token files (.bin and .idx)"),
        "merge": Command("data.merge", "merge the token files of several machines"),
        "inspect": Command("data.inspect", "describe and verify token files"),
        "index": Command("data.index", "build the index files (sample order) of a run in advance"),
    },
    "Models": {
        "evaluate": Command("models.evaluate", "evaluate a trained model at several values of k"),
        "baselines": Command("models.baselines", "compare a run's scores with unigram and bigram models"),
        "finetune": Command("models.finetune", "fine-tune a run for text classification"),
        "generate": Command("models.generate", "continue prompts at several values of k"),
        "export-hf": Command(
            "models.export_hf", "export a run to a Hugging Face folder, and verify the export"
        ),
        "import-hf": Command("models.import_hf", "turn a Hugging Face model into a run folder"),
        "average": Command("models.average", "average checkpoints of a run into a new run folder"),
        "lm-eval": Command("models.lm_eval", "run lm-evaluation-harness at several values of k"),
        "export-megatron": Command("models.export_megatron", "export a run's weights to Megatron-LM"),
    },
    "Studies": {
        "compare": Command(
            "studies.compare", "train one model with several routers, and compare the routers"
        ),
        "scaling": Command("studies.scaling", "measure how loss and speed scale with size, data and ranks"),
        "analyze": Command("studies.analyze", "analyze the routers and experts of a trained model"),
        "report": Command("studies.report", "make one page of plots from runs and studies"),
        "verify": Command("studies.verify", "check that all parallel layouts train the same model"),
    },
}
