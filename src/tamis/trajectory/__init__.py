"""Training runs that remember enough to be replayed, and what each of their samples did to the end of them.

``run`` is a trajectory, ``replay`` goes through it forwards, ``adjoint`` backwards with all scores; ``secant``,
``summary_matrix`` and ``update_error`` are refinements of the backward pass, ``leave_out`` is the ground truth, and
``recorder``, ``log`` and ``causal`` carry it all to Transformers' trainers and to disk.
"""
