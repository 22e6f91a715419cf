"""Training and evaluation of `PRUForCausalLM` on text: the paper's two regimes, resumable to the bit.

Imports go down only: `trainer, reports → dynamic → evaluate → regularisers → batches, corpus, saved → encoding → settings`;
`checkpoint`, `optimiser`, `processes`, `metrics` and `interruption` stand beside them and serve the trainer.
"""
