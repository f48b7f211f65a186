"""Engines: what runs the clients of a simulated federation. The first is chosen by default.

=============  ====================================================================================
``inprocess``  one client after another, in as many processes as there are cores
``batched``    groups of clients trained at once, their parameters stacked
``ray``        Flower's own simulation runtime, for several GPUs or machines
=============  ====================================================================================

`simulations.engines.run` runs an experiment. Nothing is imported here: a worker, which begins with
this package, would bring in the server.
"""
