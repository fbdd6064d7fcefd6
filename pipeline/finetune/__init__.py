"""Fine-tuning of the pruned network with the dense one as teacher.

In: a pruned network, its teacher, the training split. Out: the same network trained, with a resumable state. Start at
`training.py`.
"""
