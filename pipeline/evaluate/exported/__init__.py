"""Candidates' files of a captured network, cut from its graph, which is exported to ONNX once: an export takes seconds.

In: a gated `Coupling` and the exported graph. Out: the graph of any plan. Start at `unit_graph.py`; `ties.py` finds the captured
network's axes in the exported graph, `literals.py` changes the sizes that its operators hold.
"""
