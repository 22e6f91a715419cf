"""Training and evaluation of `PRUForCausalLM` on text: the paper's two regimes, resumable to the bit.

Imports go down only: `trainer → evaluate, checkpoint → regularisers, optimiser → batches, corpus → encoding → settings`.
"""
