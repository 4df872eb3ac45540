"""Cheap copies of the user's model that rank data the same way, and the baselines that they have to beat.

In the order of the work: ``rows`` (which row does what), ``compressible`` (which layers), ``probes`` (their inputs and
gradients), ``decompose`` (factors, layer by layer), ``assemble`` (a model of them), ``objectives`` and ``align`` (their
training), ``influence``, ``bench`` and ``retention`` (what is kept), ``build`` (all of it). ``layer_extraction``,
``influence_scorer`` and ``baselines`` are what it is compared with.
"""
