"""Official files <-> Transformers' <-> our checkpoints, streamed piece by piece by any number of processes.

What is read (`sources`) and what is written (`targets`) are cut into the same `pieces`; `stream` copies and verifies
them, and a `journal` knows which are done.
"""
